/* NEON with dot products, and with those of unsigned by signed bytes where TIER_I8MM says so: four
 * registers a vector.  Sums of floats are of the same pairs as AVX2's and AVX-512's: the same bits. */
#include <arm_neon.h>

typedef union {
    f32x16 f;
    i32x16 i;
    u32x16 u;
    float32x4_t f32[4];
    int32x4_t s32[4];
    uint32x4_t u32[4];
} Quarters;

#define EACH_QUARTER(expression)                                                                   \
    UNROLL for (int i = 0; i < 4; i++)                                                             \
    expression

INLINE f32x16 splat(float x)
{
    Quarters y;
    EACH_QUARTER(y.f32[i] = vdupq_n_f32(x));
    return y.f;
}

INLINE i32x16 splat_int(int32_t x)
{
    Quarters y;
    EACH_QUARTER(y.s32[i] = vdupq_n_s32(x));
    return y.i;
}

INLINE f32x16 fma16(f32x16 a, f32x16 b, f32x16 c)
{
    Quarters x = {.f = a}, y = {.f = b}, z = {.f = c};
    EACH_QUARTER(z.f32[i] = vfmaq_f32(z.f32[i], x.f32[i], y.f32[i]));
    return z.f;
}

/* Of NaN and a number the second, as on other machines, where NEON's own maximum has NaN. */
INLINE float32x4_t larger(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
INLINE float32x4_t smaller(float32x4_t a, float32x4_t b) { return vbslq_f32(vcltq_f32(a, b), a, b); }

INLINE f32x16 max16(f32x16 a, f32x16 b)
{
    Quarters x = {.f = a}, y = {.f = b};
    EACH_QUARTER(y.f32[i] = larger(x.f32[i], y.f32[i]));
    return y.f;
}

INLINE f32x16 min16(f32x16 a, f32x16 b)
{
    Quarters x = {.f = a}, y = {.f = b};
    EACH_QUARTER(y.f32[i] = smaller(x.f32[i], y.f32[i]));
    return y.f;
}

INLINE i32x16 max_int(i32x16 a, i32x16 b)
{
    Quarters x = {.i = a}, y = {.i = b};
    EACH_QUARTER(y.s32[i] = vmaxq_s32(x.s32[i], y.s32[i]));
    return y.i;
}

INLINE f32x16 to_float(i32x16 a)
{
    Quarters x = {.i = a};
    EACH_QUARTER(x.f32[i] = vcvtq_f32_s32(x.s32[i]));
    return x.f;
}

INLINE i32x16 to_nearest(f32x16 a)
{
    Quarters x = {.f = a};
    EACH_QUARTER(x.s32[i] = vcvtnq_s32_f32(x.f32[i]));
    return x.i;
}

#ifdef TIER_I8MM
#define DOT4_IS_SIGNED 0
#define DOT4(c, w, x) vusdotq_s32(c, vreinterpretq_u8_u32(w), vreinterpretq_s8_s32(x))
#else
#define DOT4_IS_SIGNED 1
#define DOT4(c, w, x) vdotq_s32(c, vreinterpretq_s8_u32(w), vreinterpretq_s8_s32(x))
#endif

INLINE i32x16 dot4(i32x16 c, u32x16 w, i32x16 x)
{
    Quarters sum = {.i = c}, a = {.u = w}, b = {.i = x};
    EACH_QUARTER(sum.s32[i] = DOT4(sum.s32[i], a.u32[i], b.s32[i]));
    return sum.i;
}

INLINE f32x16 load_half(const uint16_t *p)
{
    Quarters y;
    EACH_QUARTER(y.f32[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))));
    return y.f;
}

INLINE void store_half(uint16_t *p, f32x16 a)
{
    Quarters x = {.f = a};
    EACH_QUARTER(vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(x.f32[i]))));
}

INLINE f32x16 load_bfloat(const uint16_t *p)
{
    Quarters y;
    EACH_QUARTER(y.u32[i] = vshll_n_u16(vld1_u16(p + 4 * i), 16));
    return y.f;
}

INLINE f32x16 load_unsigned_bytes(const uint8_t *p)
{
    uint8x16_t bytes = vld1q_u8(p);
    uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_u8(vget_high_u8(bytes));
    Quarters y = {.u32 = {vmovl_u16(vget_low_u16(low)), vmovl_u16(vget_high_u16(low)),
                          vmovl_u16(vget_low_u16(high)), vmovl_u16(vget_high_u16(high))}};
    return to_float(y.i);
}

INLINE f32x16 load_signed_bytes(const uint8_t *p)
{
    int8x16_t bytes = vreinterpretq_s8_u8(vld1q_u8(p));
    int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
    Quarters y = {.s32 = {vmovl_s16(vget_low_s16(low)), vmovl_s16(vget_high_s16(low)),
                          vmovl_s16(vget_low_s16(high)), vmovl_s16(vget_high_s16(high))}};
    return to_float(y.i);
}

INLINE void store_bytes(int8_t *p, i32x16 a)
{
    Quarters x = {.i = a};
    int16x8_t low = vcombine_s16(vmovn_s32(x.s32[0]), vmovn_s32(x.s32[1]));
    int16x8_t high = vcombine_s16(vmovn_s32(x.s32[2]), vmovn_s32(x.s32[3]));
    vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
}

INLINE float sum16(f32x16 a)
{
    Quarters x = {.f = a};
    float32x4_t s = vaddq_f32(vaddq_f32(x.f32[0], x.f32[2]), vaddq_f32(x.f32[1], x.f32[3]));
    return vpadds_f32(vadd_f32(vget_low_f32(s), vget_high_f32(s)));
}

INLINE float largest16(f32x16 a)
{
    Quarters x = {.f = a};
    float32x4_t m = larger(larger(x.f32[0], x.f32[2]), larger(x.f32[1], x.f32[3]));
    m = larger(m, vextq_f32(m, m, 2));
    m = larger(m, vextq_f32(m, m, 1));
    return vgetq_lane_f32(m, 0);
}

INLINE int32_t sum_int(i32x16 a)
{
    Quarters x = {.i = a};
    return vaddvq_s32(vaddq_s32(vaddq_s32(x.s32[0], x.s32[1]), vaddq_s32(x.s32[2], x.s32[3])));
}

INLINE int32_t largest_int(i32x16 a)
{
    Quarters x = {.i = a};
    return vmaxvq_s32(vmaxq_s32(vmaxq_s32(x.s32[0], x.s32[1]), vmaxq_s32(x.s32[2], x.s32[3])));
}

INLINE void prefetch(const void *p) { __builtin_prefetch(p); }
INLINE void prefetch_far(const void *p) { __builtin_prefetch(p, 0, 2); }

/* Takes about as long as the others' pause, which yield does not. */
INLINE void pause_briefly(void) { __asm__ volatile("isb"); }
