// __nv_bfloat16 and __nv_bfloat162: the upper half of a float.
#pragma once
#include "cuda_emulation.h"
#include "half_operations.h"

struct __nv_bfloat16_raw {
  unsigned short x;
};
struct __nv_bfloat16 {
  unsigned short x;
  __nv_bfloat16() = default;
  __nv_bfloat16(__nv_bfloat16_raw raw) : x(raw.x) {}
  __nv_bfloat16(float value) : x(0x7FFF) {
    unsigned bits = __float_as_uint(value);
    if (!isnan(value)) x = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;  // nearest, ties to even
  }
  __nv_bfloat16(double value) : __nv_bfloat16((float)value) {}
  __nv_bfloat16(int value) : __nv_bfloat16((float)value) {}
  operator float() const { return __uint_as_float((unsigned)x << 16); }
};
typedef __nv_bfloat16 nv_bfloat16;
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
typedef __nv_bfloat162 nv_bfloat162;

EMU_FUNCTION unsigned short __bfloat16_as_ushort(__nv_bfloat16 h) { return h.x; }
EMU_FUNCTION __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
  return __nv_bfloat16_raw{bits};
}
EMU_FUNCTION __nv_bfloat16 emu_fma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
  return __nv_bfloat16(fmaf(a, b, c));
}
EMU_HALF_OPERATIONS(__nv_bfloat16, __nv_bfloat162)

EMU_FUNCTION float __bfloat162float(__nv_bfloat16 h) { return h; }
EMU_FUNCTION __nv_bfloat16 __float2bfloat16(float x) { return __nv_bfloat16(x); }
EMU_FUNCTION __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }
EMU_FUNCTION __nv_bfloat16 __float2bfloat16_rz(float x) {
  return __ushort_as_bfloat16(__float_as_uint(x) >> 16);
}
EMU_FUNCTION __nv_bfloat16 __int2bfloat16_rn(int x) { return __nv_bfloat16(x); }
EMU_FUNCTION float2 __bfloat1622float2(__nv_bfloat162 h) { return {h.x, h.y}; }
EMU_FUNCTION __nv_bfloat162 __float22bfloat162_rn(float2 f) {
  return {__nv_bfloat16(f.x), __nv_bfloat16(f.y)};
}
EMU_FUNCTION __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__nv_bfloat16(x), __nv_bfloat16(y)};
}
EMU_FUNCTION __nv_bfloat162 __float2bfloat162_rn(float x) {
  return {__nv_bfloat16(x), __nv_bfloat16(x)};
}
EMU_FUNCTION __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
EMU_FUNCTION __nv_bfloat162 make_bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
EMU_FUNCTION __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 h) { return {h, h}; }
EMU_FUNCTION __nv_bfloat16 __low2bfloat16(__nv_bfloat162 h) { return h.x; }
EMU_FUNCTION __nv_bfloat16 __high2bfloat16(__nv_bfloat162 h) { return h.y; }
EMU_FUNCTION __nv_bfloat162 __low2bfloat162(__nv_bfloat162 h) { return {h.x, h.x}; }
EMU_FUNCTION __nv_bfloat162 __high2bfloat162(__nv_bfloat162 h) { return {h.y, h.y}; }
