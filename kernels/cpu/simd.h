/* Vectors of 32-bit lanes, as wide as the tier's registers.  Kernels work with any number of lanes
 * that divides sixteen.
 *
 * A tier is a header that implements the primitives below for its instruction set, over the
 * types of simd_types.h.  Otherwise kernels refer to tiers only for the number of registers and
 * for AMX.  Vectors wider than registers would be split by the compiler, but gcc keeps those in
 * memory.  Everything is compiled with -ffp-contract=off, so a product and a sum are fused only
 * by `fma_v`. */
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

/* Besides functions, a tier defines:
 *     HAS_DOT4            1 if it has int8 dot products of four (dot4), else 0, and it has madd
 *     WEIGHTS_ARE_SIGNED  1 if these take 8-bit weights as signed, else 0 */

INLINE void prefetch_write(const void *p) { __builtin_prefetch(p, 1); }

/* |x| as integers, which compare like |x|; NaN is larger than all. */
INLINE i32v abs_bits(f32v x) { return (i32v)x & splat_int(0x7fffffff); }

INLINE float float_from_bits(int32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE int lanes_left(int width, int i) { return width - i < LANES ? width - i : LANES; }

/* The first n lanes, or all if n is larger; the other lanes are 0.  n may be negative if sixteen
 * values take several vectors. */
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

/* exp(x) with a relative error of 1e-7; exact for 0; below -87 it returns exp(-87).  The method is
 * that of the sampling contract: 2^n exp(r), |r| <= ln 2 / 2. */
INLINE f32v exp_v(f32v x)
{
    x = max_v(splat(-87.0f), min_v(splat(88.0f), x)); /* in this order of arguments NaN passes */
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
