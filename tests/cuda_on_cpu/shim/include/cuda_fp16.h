// __half and __half2: IEEE float16, with denormals.
#pragma once
#include "cuda_emulation.h"
#include "half_operations.h"

struct __half_raw {
  unsigned short x;
};
struct __half {
  unsigned short x;
  __half() = default;
  __half(__half_raw raw) : x(raw.x) {}
  __half(float value) : x(emu_bits<unsigned short>((_Float16)value)) {}
  __half(double value) : __half((float)value) {}
  __half(int value) : __half((float)value) {}
  operator float() const { return (float)emu_bits<_Float16>(x); }
};
typedef __half half;
struct alignas(4) __half2 {
  __half x, y;
};
typedef __half2 half2;

EMU_FUNCTION unsigned short __half_as_ushort(__half h) { return h.x; }
EMU_FUNCTION short __half_as_short(__half h) { return (short)h.x; }
EMU_FUNCTION __half __ushort_as_half(unsigned short bits) { return __half_raw{bits}; }
EMU_FUNCTION __half __short_as_half(short bits) { return __half_raw{(unsigned short)bits}; }

// A product of two float16 is exact in double, so rounding the sum to odd in float, then to float16,
// rounds once.
EMU_FUNCTION float emu_round_to_odd(double x) {
  float nearest = (float)x;
  if ((double)nearest == x || isnan(x) || isinf(nearest)) return nearest;
  unsigned bits = __float_as_uint(nearest);
  bool is_away = fabs((double)nearest) > fabs(x);
  return __uint_as_float((is_away ? bits - 1 : bits) | 1);
}
EMU_FUNCTION __half emu_fma(__half a, __half b, __half c) {
  return __half(emu_round_to_odd((double)(float)a * (double)(float)b + (double)(float)c));
}
EMU_HALF_OPERATIONS(__half, __half2)

EMU_FUNCTION float __half2float(__half h) { return h; }
EMU_FUNCTION __half __float2half(float x) { return __half(x); }
EMU_FUNCTION __half __float2half_rn(float x) { return __half(x); }
EMU_FUNCTION __half __float2half_rz(float x) {
  __half nearest(x);
  bool is_away = fabsf(nearest) > fabsf(x);
  return __ushort_as_half(nearest.x - is_away);
}
EMU_FUNCTION __half __double2half(double x) { return __half(emu_round_to_odd(x)); }
EMU_FUNCTION __half __int2half_rn(int x) { return __half(emu_round_to_odd(x)); }
EMU_FUNCTION __half __uint2half_rn(unsigned x) { return __half(emu_round_to_odd(x)); }
EMU_FUNCTION __half __short2half_rn(short x) { return __half((float)x); }
EMU_FUNCTION __half __ushort2half_rn(unsigned short x) { return __half((float)x); }
EMU_FUNCTION int __half2int_rn(__half h) { return __float2int_rn(h); }
EMU_FUNCTION int __half2int_rz(__half h) { return __float2int_rz(h); }
EMU_FUNCTION float2 __half22float2(__half2 h) { return {h.x, h.y}; }
EMU_FUNCTION __half2 __float22half2_rn(float2 f) { return {__half(f.x), __half(f.y)}; }
EMU_FUNCTION __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
EMU_FUNCTION __half2 __float2half2_rn(float x) { return {__half(x), __half(x)}; }
EMU_FUNCTION __half2 __halves2half2(__half x, __half y) { return {x, y}; }
EMU_FUNCTION __half2 make_half2(__half x, __half y) { return {x, y}; }
EMU_FUNCTION __half2 __half2half2(__half h) { return {h, h}; }
EMU_FUNCTION __half __low2half(__half2 h) { return h.x; }
EMU_FUNCTION __half __high2half(__half2 h) { return h.y; }
EMU_FUNCTION __half2 __low2half2(__half2 h) { return {h.x, h.x}; }
EMU_FUNCTION __half2 __high2half2(__half2 h) { return {h.y, h.y}; }
EMU_FUNCTION __half2 __lows2half2(__half2 a, __half2 b) { return {a.x, b.x}; }
EMU_FUNCTION __half2 __highs2half2(__half2 a, __half2 b) { return {a.y, b.y}; }
EMU_FUNCTION __half2 __lowhigh2highlow(__half2 h) { return {h.y, h.x}; }
