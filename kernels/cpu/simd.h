/* Vectors of sixteen 32-bit lanes, the one width that every kernel is written in.
 *
 * A tier is a header that defines the primitives below for its instruction set; kernels know no
 * other difference between tiers.  Everything compiles with -ffp-contract=off, so that a product
 * and a sum are fused only where `fma16` says so. */
#ifndef SIMD_H
#define SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));

#define INLINE static inline __attribute__((always_inline))
#if !defined(TIER_AVX512) && !defined(TIER_AVX2) && !defined(TIER_NEON)
#define UNROLL /* vectors are memory: unrolled, they take minutes to compile and run no faster */
#elif defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

INLINE f32x16 load(const float *p)
{
    f32x16 x;
    memcpy(&x, p, sizeof x);
    return x;
}

INLINE void store(float *p, f32x16 x) { memcpy(p, &x, sizeof x); }

INLINE u32x16 load_bytes(const uint8_t *p)
{
    u32x16 x;
    memcpy(&x, p, sizeof x);
    return x;
}

/* Where mask is -1 a, where it is 0 b. */
INLINE f32x16 choose(i32x16 mask, f32x16 a, f32x16 b)
{
    return (f32x16)((mask & (i32x16)a) | (~mask & (i32x16)b));
}

#if defined(TIER_AVX512)
#include "avx512.h"
#elif defined(TIER_AVX2)
#include "avx2.h"
#elif defined(TIER_NEON)
#include "neon.h"
#else
#include "portable.h"
#endif

/* Whether dot4 takes the bytes of weights as signed; else they are unsigned. */
#ifndef DOT4_IS_SIGNED
#define DOT4_IS_SIGNED 0
#endif

INLINE void prefetch_write(const void *p) { __builtin_prefetch(p, 1); }

/* The sizes of x as integers, which compare as the sizes do; NaN is larger than all. */
INLINE i32x16 size_bits(f32x16 x) { return (i32x16)x & splat_int(0x7fffffff); }

INLINE float float_of(int32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* The first n lanes, 16 at most; the others are 0. */
INLINE f32x16 load_first(const float *p, int n)
{
    f32x16 x = {0};
    if (n >= 16)
        return load(p);
    memcpy(&x, p, sizeof(float) * (size_t)n);
    return x;
}

INLINE void store_first(float *p, f32x16 x, int n)
{
    if (n >= 16)
        store(p, x);
    else
        memcpy(p, &x, sizeof(float) * (size_t)n);
}

INLINE i32x16 lanes(void)
{
    return (i32x16){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
}

/* exp(x) to 1e-7 of itself, for x below -87 that of -87; exp(0) is 1.  The method is that of the
 * sampling contract: 2^n exp(r), |r| <= ln 2 / 2. */
INLINE f32x16 exp16(f32x16 x)
{
    x = max16(splat(-87.0f), min16(splat(88.0f), x)); /* this way round NaN passes */
    i32x16 n = to_nearest(x * splat(0x1.715476p+0f));
    f32x16 whole = to_float(n);
    f32x16 r = fma16(whole, splat(-0x1.7f7d1cp-20f), fma16(whole, splat(-0x1.62e4p-1f), x));
    f32x16 y = splat(0x1.6a23d0p-10f);
    y = fma16(y, r, splat(0x1.123a20p-7f));
    y = fma16(y, r, splat(0x1.5558f2p-5f));
    y = fma16(y, r, splat(0x1.555492p-3f));
    y = fma16(y, r, splat(0x1.fffffcp-2f));
    y = fma16(y, r, splat(1.0f));
    y = fma16(y, r, splat(1.0f));
    return y * (f32x16)((n + 127) << 23);
}

/* tanh(x) = 1 - 2 / (exp(2 x) + 1) */
INLINE f32x16 tanh16(f32x16 x)
{
    x = max16(splat(-20.0f), min16(splat(20.0f), x));
    return splat(1.0f) - splat(2.0f) / (exp16(x + x) + splat(1.0f));
}

#endif
