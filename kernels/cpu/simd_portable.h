/* Any CPU: GNU vector extensions over 128-bit registers, which nearly all CPUs have. */
#include "simd_types.h"

INLINE f32v splat(float x) { return (f32v){x, x, x, x}; }
INLINE i32v splat_int(int32_t x) { return (i32v){x, x, x, x}; }

INLINE f32v fma_v(f32v a, f32v b, f32v c) { return a * b + c; }
INLINE f32v max_v(f32v a, f32v b) { return blend(a > b, a, b); }
INLINE f32v min_v(f32v a, f32v b) { return blend(a < b, a, b); }

INLINE i32v max_int(i32v a, i32v b)
{
    i32v more = a > b;
    return (more & a) | (~more & b);
}

INLINE f32v to_float(i32v x) { return __builtin_convertvector(x, f32v); }

/* Rounds to the nearest integer, ties to even, for |x| < 2^22: 1.5 * 2^23 has units of 1. */
INLINE i32v round_to_int(f32v x)
{
    f32v shifted = x + splat(0x1.8p+23f);
    return (i32v)shifted - 0x4b400000;
}

#define HAS_DOT4 0
#define WEIGHTS_ARE_SIGNED 1

INLINE i32v madd(i32v c, u32v w, i32v x)
{
#ifdef __SSE2__
    typedef short Shorts __attribute__((vector_size(4 * LANES)));
    return c + (i32v)__builtin_ia32_pmaddwd128((Shorts)w, (Shorts)x);
#else
    i32v low = ((i32v)(w << 16) >> 16) * ((x << 16) >> 16);
    return c + low + ((i32v)w >> 16) * (x >> 16);
#endif
}

INLINE u32v load_wide(const uint16_t *p) { return (u32v){p[0], p[1], p[2], p[3]}; }

/* Exponent and fraction moved into place make the number times 2^-112. */
INLINE f32v load_f16(const uint16_t *p)
{
    u32v h = load_wide(p);
    f32v size = (f32v)((h & 0x7fff) << 13) * splat(0x1p+112f);
    i32v is_special = (i32v)((h & 0x7c00) == 0x7c00);
    u32v special = ((h & 0x3ff) << 13) | 0x7f800000;
    return (f32v)((u32v)blend(is_special, (f32v)special, size) | ((h & 0x8000) << 16));
}

/* Rounds to nearest, ties to even.  A subnormal half is aligned by adding a number whose units are
 * those of subnormal halves.  Numbers beyond the largest half become infinity; NaN stays NaN. */
INLINE uint16_t f16_from_float(float x)
{
    uint32_t bits, sign, aligned;
    memcpy(&bits, &x, sizeof bits);
    sign = bits & 0x80000000u;
    bits ^= sign;
    if (bits >= 0x47800000u) {
        bits = bits > 0x7f800000u ? 0x7e00 : 0x7c00;
    } else if (bits < 0x38800000u) {
        float size;
        memcpy(&size, &bits, sizeof size);
        size += 0.5f;
        memcpy(&aligned, &size, sizeof aligned);
        bits = aligned - 0x3f000000u;
    } else {
        bits = (bits - 0x38000000u + 0xfff + (bits >> 13 & 1)) >> 13;
    }
    return (uint16_t)(bits | sign >> 16);
}

INLINE void store_f16(uint16_t *p, f32v x)
{
    for (int i = 0; i < LANES; i++)
        p[i] = f16_from_float(x[i]);
}

INLINE f32v load_bf16(const uint16_t *p) { return (f32v)(load_wide(p) << 16); }

INLINE f32v load_u8(const uint8_t *p)
{
    i32v x = {p[0], p[1], p[2], p[3]};
    return to_float(x);
}

INLINE f32v load_i8(const uint8_t *p)
{
    i32v x = {(int8_t)p[0], (int8_t)p[1], (int8_t)p[2], (int8_t)p[3]};
    return to_float(x);
}

INLINE void store_low_bytes(int8_t *p, i32v x)
{
    for (int i = 0; i < LANES; i++)
        p[i] = (int8_t)x[i];
}

INLINE float reduce_add(f32v x) { return (x[0] + x[2]) + (x[1] + x[3]); }
INLINE int32_t reduce_add_int(i32v x) { return x[0] + x[1] + x[2] + x[3]; }

INLINE float reduce_max(f32v x)
{
    float a = x[0] > x[2] ? x[0] : x[2], b = x[1] > x[3] ? x[1] : x[3];
    return a > b ? a : b;
}

INLINE int32_t reduce_max_int(i32v x)
{
    int32_t a = x[0] > x[2] ? x[0] : x[2], b = x[1] > x[3] ? x[1] : x[3];
    return a > b ? a : b;
}

INLINE void prefetch(const void *p) { __builtin_prefetch(p); }
INLINE void prefetch_far(const void *p) { __builtin_prefetch(p, 0, 2); }

INLINE void cpu_pause(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}
