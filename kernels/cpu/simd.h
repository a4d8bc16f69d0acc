/* Vectors of 32-bit lanes, as wide as the registers of the tier: kernels are written for any number of
 * lanes that divides sixteen.
 *
 * A tier is a header that defines LANES, and the primitives below for its instruction set; kernels
 * know no other difference between tiers.  Wider vectors than registers would be cut up by the
 * compiler, but gcc keeps those in memory.  Everything compiles with -ffp-contract=off, so that a
 * product and a sum are fused only where `fma_v` says so. */
#ifndef SIMD_H
#define SIMD_H

#include "simd_types.h"

#if defined(TIER_AVX512)
#include "simd_avx512.h"
#elif defined(TIER_AVX2)
#include "simd_avx2.h"
#elif defined(TIER_NEON)
#include "simd_neon.h"
#else
#include "simd_portable.h"
#endif

/* Of a tier is expected, beside what its header shows:
 *     HAS_DOT4            whether it has products of bytes, dot4; else of 16-bit integers, dot2
 *     WEIGHTS_ARE_SIGNED  whether these take weights of 8 bits as signed; else they are unsigned */

INLINE void prefetch_write(const void *p) { __builtin_prefetch(p, 1); }

/* The sizes of x as integers, which compare as the sizes do; NaN is larger than all. */
INLINE i32v abs_bits(f32v x) { return (i32v)x & splat_int(0x7fffffff); }

INLINE float float_from_bits(int32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE int lanes_left(int width, int i) { return width - i < LANES ? width - i : LANES; }

/* The first n lanes, all of them if n is larger; the others are 0.  Of the parts of sixteen some may
 * have none. */
INLINE f32v load_partial(const float *p, int n)
{
    f32v x = {0};
    if (n >= LANES)
        return load(p);
    if (VECTORS == 1 || n > 0)
        memcpy(&x, p, sizeof(float) * (size_t)n);
    return x;
}

INLINE void store_partial(float *p, f32v x, int n)
{
    if (n >= LANES)
        store(p, x);
    else if (VECTORS == 1 || n > 0)
        memcpy(p, &x, sizeof(float) * (size_t)n);
}

INLINE i32v lane_numbers(void)
{
    const int32_t sixteen[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    i32v x;
    memcpy(&x, sixteen, sizeof x);
    return x;
}

/* exp(x) to 1e-7 of itself, for x below -87 that of -87; exp(0) is 1.  The method is that of the
 * sampling contract: 2^n exp(r), |r| <= ln 2 / 2. */
INLINE f32v exp_v(f32v x)
{
    x = max_v(splat(-87.0f), min_v(splat(88.0f), x)); /* this way round NaN passes */
    i32v n = round_to_int(x * splat(0x1.715476p+0f));
    f32v whole = to_float(n);
    f32v r = fma_v(whole, splat(-0x1.7f7d1cp-20f), fma_v(whole, splat(-0x1.62e4p-1f), x));
    f32v y = splat(0x1.6a23d0p-10f);
    y = fma_v(y, r, splat(0x1.123a20p-7f));
    y = fma_v(y, r, splat(0x1.5558f2p-5f));
    y = fma_v(y, r, splat(0x1.555492p-3f));
    y = fma_v(y, r, splat(0x1.fffffcp-2f));
    y = fma_v(y, r, splat(1.0f));
    y = fma_v(y, r, splat(1.0f));
    return y * (f32v)((n + 127) << 23);
}

/* tanh(x) = 1 - 2 / (exp(2 x) + 1) */
INLINE f32v tanh_v(f32v x)
{
    x = max_v(splat(-20.0f), min_v(splat(20.0f), x));
    return splat(1.0f) - splat(2.0f) / (exp_v(x + x) + splat(1.0f));
}

#endif
