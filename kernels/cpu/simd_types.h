/* A tier's vector types, and what GNU C can do with them on any CPU. */
#ifndef SIMD_TYPES_H
#define SIMD_TYPES_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(TIER_AVX512)
enum { LANES = 16 };
#elif defined(TIER_AVX2)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif

/* Vectors that hold sixteen values: the rows of a weight group, the positions of a cache block. */
enum { VECTORS = 16 / LANES };

typedef float f32v __attribute__((vector_size(4 * LANES)));
typedef int32_t i32v __attribute__((vector_size(4 * LANES)));
typedef uint32_t u32v __attribute__((vector_size(4 * LANES)));

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

INLINE f32v load(const float *p)
{
    f32v x;
    memcpy(&x, p, sizeof x);
    return x;
}

INLINE void store(float *p, f32v x) { memcpy(p, &x, sizeof x); }

INLINE u32v load_bytes(const uint8_t *p)
{
    u32v x;
    memcpy(&x, p, sizeof x);
    return x;
}

/* a in lanes where mask is -1, b where it is 0. */
INLINE f32v blend(i32v mask, f32v a, f32v b)
{
    return (f32v)((mask & (i32v)a) | (~mask & (i32v)b));
}

#endif
