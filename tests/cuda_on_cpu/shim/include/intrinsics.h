// Scalar intrinsics.  Where CUDA's are approximate, these are the C library's functions.
#pragma once

#undef isfinite
#undef isinf
#undef isnan
#undef signbit
EMU_FUNCTION bool isfinite(double x) { return __builtin_isfinite(x); }
EMU_FUNCTION bool isinf(float x) { return __builtin_isinf(x); }
EMU_FUNCTION bool isnan(float x) { return __builtin_isnan(x); }
EMU_FUNCTION bool signbit(double x) { return __builtin_signbit(x); }

template <class To, class From>
EMU_FUNCTION To emu_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
EMU_FUNCTION unsigned __float_as_uint(float x) { return emu_bits<unsigned>(x); }
EMU_FUNCTION int __float_as_int(float x) { return emu_bits<int>(x); }
EMU_FUNCTION float __uint_as_float(unsigned x) { return emu_bits<float>(x); }
EMU_FUNCTION float __int_as_float(int x) { return emu_bits<float>(x); }
EMU_FUNCTION long long __double_as_longlong(double x) { return emu_bits<long long>(x); }
EMU_FUNCTION double __longlong_as_double(long long x) { return emu_bits<double>(x); }

EMU_FUNCTION int __popc(unsigned x) { return __builtin_popcount(x); }
EMU_FUNCTION int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
EMU_FUNCTION int __clz(int x) { return x ? __builtin_clz(x) : 32; }
EMU_FUNCTION int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
EMU_FUNCTION int __ffs(int x) { return __builtin_ffs(x); }
EMU_FUNCTION int __ffsll(long long x) { return __builtin_ffsll(x); }
EMU_FUNCTION unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; i++) reversed |= (x >> i & 1) << (31 - i);
  return reversed;
}
EMU_FUNCTION int __mulhi(int a, int b) { return (int64_t)a * b >> 32; }
EMU_FUNCTION unsigned __umulhi(unsigned a, unsigned b) { return (uint64_t)a * b >> 32; }
EMU_FUNCTION unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned __int128)a * b >> 64;
}
EMU_FUNCTION unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  uint64_t bytes = (uint64_t)b << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; i++) {
    unsigned nibble = selector >> 4 * i & 15;
    unsigned byte = bytes >> (nibble & 7) * 8 & 255;
    if (nibble & 8) byte = byte & 128 ? 255 : 0;  // the sign, replicated
    result |= byte << 8 * i;
  }
  return result;
}
EMU_FUNCTION unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return ((uint64_t)high << 32 | low) >> (shift & 31);
}
EMU_FUNCTION unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return ((uint64_t)high << 32 | low) << (shift & 31) >> 32;
}
EMU_FUNCTION int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; i++) c += (int)(int8_t)(a >> 8 * i) * (int8_t)(b >> 8 * i);
  return c;
}
EMU_FUNCTION unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int i = 0; i < 4; i++) c += (a >> 8 * i & 255) * (b >> 8 * i & 255);
  return c;
}
EMU_FUNCTION unsigned __vsubss4(unsigned a, unsigned b) {
  unsigned result = 0;
  for (int i = 0; i < 4; i++) {
    int difference = (int8_t)(a >> 8 * i) - (int8_t)(b >> 8 * i);
    difference = difference < -128 ? -128 : difference > 127 ? 127 : difference;
    result |= (difference & 255u) << 8 * i;
  }
  return result;
}
EMU_FUNCTION unsigned __vsub4(unsigned a, unsigned b) {
  unsigned result = 0;
  for (int i = 0; i < 4; i++) result |= (((a >> 8 * i) - (b >> 8 * i)) & 255u) << 8 * i;
  return result;
}
EMU_FUNCTION unsigned __vadd4(unsigned a, unsigned b) {
  unsigned result = 0;
  for (int i = 0; i < 4; i++) result |= (((a >> 8 * i) + (b >> 8 * i)) & 255u) << 8 * i;
  return result;
}

// The compiler may not contract a product that is rounded by name into a fused multiply-add.
template <class T>
EMU_FUNCTION T emu_rounded(T x) {
  asm("" : "+x"(x));
  return x;
}
EMU_FUNCTION float __fadd_rn(float a, float b) { return emu_rounded(a + b); }
EMU_FUNCTION float __fsub_rn(float a, float b) { return emu_rounded(a - b); }
EMU_FUNCTION float __fmul_rn(float a, float b) { return emu_rounded(a * b); }
EMU_FUNCTION float __fdiv_rn(float a, float b) { return emu_rounded(a / b); }
EMU_FUNCTION float __frcp_rn(float a) { return emu_rounded(1.0f / a); }
EMU_FUNCTION float __fsqrt_rn(float a) { return emu_rounded(sqrtf(a)); }
EMU_FUNCTION float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
EMU_FUNCTION double __dadd_rn(double a, double b) { return emu_rounded(a + b); }
EMU_FUNCTION double __dsub_rn(double a, double b) { return emu_rounded(a - b); }
EMU_FUNCTION double __dmul_rn(double a, double b) { return emu_rounded(a * b); }
EMU_FUNCTION double __ddiv_rn(double a, double b) { return emu_rounded(a / b); }
EMU_FUNCTION double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
EMU_FUNCTION float rsqrtf(float x) { return 1.0f / sqrtf(x); }
EMU_FUNCTION float __frsqrt_rn(float x) { return 1.0f / sqrtf(x); }
EMU_FUNCTION float __fdividef(float a, float b) { return a / b; }
EMU_FUNCTION float fdividef(float a, float b) { return a / b; }
EMU_FUNCTION float __saturatef(float x) { return x > 0 ? x < 1 ? x : 1 : 0; }
// The C library declares some of these names itself.
#define __expf(x) expf(x)
#define __exp10f(x) exp10f(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __powf(x, y) powf(x, y)
#define __tanhf(x) tanhf(x)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __sincosf(x, s, c) sincosf(x, s, c)

// A conversion to an integer saturates, and takes NaN to 0.  (In C it is undefined, and a cast in a
// kernel is compiled as C.)
template <class T>
EMU_FUNCTION T emu_saturated(double x) {
  constexpr T low = std::numeric_limits<T>::min(), high = std::numeric_limits<T>::max();
  return x != x ? 0 : x <= (double)low ? low : x >= (double)high ? high : (T)x;
}
#define EMU_CONVERSIONS(from, From, to, To)                                             \
  EMU_FUNCTION To __##from##2##to##_rn(From x) { return emu_saturated<To>(nearbyint(x)); } \
  EMU_FUNCTION To __##from##2##to##_rz(From x) { return emu_saturated<To>(trunc(x)); }     \
  EMU_FUNCTION To __##from##2##to##_rd(From x) { return emu_saturated<To>(floor(x)); }     \
  EMU_FUNCTION To __##from##2##to##_ru(From x) { return emu_saturated<To>(ceil(x)); }
EMU_CONVERSIONS(float, float, int, int)
EMU_CONVERSIONS(float, float, uint, unsigned)
EMU_CONVERSIONS(float, float, ll, long long)
EMU_CONVERSIONS(float, float, ull, unsigned long long)
EMU_CONVERSIONS(double, double, int, int)
EMU_CONVERSIONS(double, double, uint, unsigned)
EMU_CONVERSIONS(double, double, ll, long long)
EMU_CONVERSIONS(double, double, ull, unsigned long long)
EMU_FUNCTION float __int2float_rn(int x) { return (float)x; }
EMU_FUNCTION float __uint2float_rn(unsigned x) { return (float)x; }
EMU_FUNCTION float __ll2float_rn(long long x) { return (float)x; }
EMU_FUNCTION float __ull2float_rn(unsigned long long x) { return (float)x; }
EMU_FUNCTION double __ll2double_rn(long long x) { return (double)x; }
EMU_FUNCTION double __ull2double_rn(unsigned long long x) { return (double)x; }
EMU_FUNCTION float __double2float_rn(double x) { return (float)x; }

template <class A, class B>
EMU_FUNCTION std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
EMU_FUNCTION std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}
EMU_FUNCTION int abs(int x) { return x < 0 ? -x : x; }
EMU_FUNCTION long long abs(long long x) { return x < 0 ? -x : x; }
EMU_FUNCTION float abs(float x) { return fabsf(x); }
EMU_FUNCTION double abs(double x) { return fabs(x); }
EMU_FUNCTION float min(float a, float b) { return fminf(a, b); }
EMU_FUNCTION float max(float a, float b) { return fmaxf(a, b); }

// Loads and stores with a cache hint.
#define EMU_LOAD(name) \
  template <class T>   \
  EMU_FUNCTION T name(const T* p) { return *p; }
#define EMU_STORE(name) \
  template <class T>    \
  EMU_FUNCTION void name(T* p, std::common_type_t<T> value) { *p = value; }
EMU_LOAD(__ldg)
EMU_LOAD(__ldca)
EMU_LOAD(__ldcg)
EMU_LOAD(__ldcs)
EMU_LOAD(__ldlu)
EMU_LOAD(__ldcv)
EMU_STORE(__stwb)
EMU_STORE(__stcg)
EMU_STORE(__stcs)
EMU_STORE(__stwt)

EMU_FUNCTION long long clock64() { return (long long)__builtin_ia32_rdtsc(); }
EMU_FUNCTION void __nanosleep(unsigned) {}
EMU_FUNCTION void __trap(EMU_LINE) { emu_fail("__trap()", line); }
#define assert(condition) \
  ((condition) ? (void)0 : emu_fail("assertion " #condition " failed", __LINE__))
#define __builtin_assume(condition) \
  ((condition) ? (void)0 : emu_fail("assumption " #condition " is false", __LINE__))
