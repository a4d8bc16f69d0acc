/* NEON with int8 dot products, also of unsigned by signed bytes if TIER_I8MM is defined. */
#include <arm_neon.h>

#include "simd_types.h"

INLINE f32v splat(float x) { return (f32v)vdupq_n_f32(x); }
INLINE i32v splat_int(int32_t x) { return (i32v)vdupq_n_s32(x); }

INLINE f32v fma_v(f32v a, f32v b, f32v c)
{
    return (f32v)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}

/* If a or b is NaN, these return b, as on other CPUs; NEON's own maximum returns NaN. */
INLINE f32v max_v(f32v a, f32v b) { return blend(a > b, a, b); }
INLINE f32v min_v(f32v a, f32v b) { return blend(a < b, a, b); }

INLINE i32v max_int(i32v a, i32v b) { return (i32v)vmaxq_s32((int32x4_t)a, (int32x4_t)b); }

INLINE f32v to_float(i32v x) { return (f32v)vcvtq_f32_s32((int32x4_t)x); }
INLINE i32v round_to_int(f32v x) { return (i32v)vcvtnq_s32_f32((float32x4_t)x); }

/* c + the dot product of four bytes of w with four signed bytes of x, in each lane; w is signed if
 * WEIGHTS_ARE_SIGNED. */
#define HAS_DOT4 1
#ifdef TIER_I8MM
#define WEIGHTS_ARE_SIGNED 0
#define DOT4(c, w, x) vusdotq_s32(c, (uint8x16_t)(w), (int8x16_t)(x))
#else
#define WEIGHTS_ARE_SIGNED 1
#define DOT4(c, w, x) vdotq_s32(c, (int8x16_t)(w), (int8x16_t)(x))
#endif

INLINE i32v dot4(i32v c, u32v w, i32v x) { return (i32v)DOT4((int32x4_t)c, w, x); }

INLINE f32v load_f16(const uint16_t *p)
{
    return (f32v)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}

INLINE void store_f16(uint16_t *p, f32v x)
{
    vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x)));
}

INLINE f32v load_bf16(const uint16_t *p) { return (f32v)vshll_n_u16(vld1_u16(p), 16); }

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

/* Stores the low byte of each lane. */
INLINE void store_low_bytes(int8_t *p, i32v x)
{
    int16x4_t narrow = vmovn_s32((int32x4_t)x);
    int8x8_t bytes = vmovn_s16(vcombine_s16(narrow, narrow));
    vst1_lane_s32((void *)p, vreinterpret_s32_s8(bytes), 0);
}

INLINE float reduce_add(f32v x) { return (x[0] + x[2]) + (x[1] + x[3]); }

INLINE float reduce_max(f32v x)
{
    float a = x[0] > x[2] ? x[0] : x[2], b = x[1] > x[3] ? x[1] : x[3];
    return a > b ? a : b;
}

INLINE int32_t reduce_add_int(i32v x) { return vaddvq_s32((int32x4_t)x); }
INLINE int32_t reduce_max_int(i32v x) { return vmaxvq_s32((int32x4_t)x); }

INLINE void prefetch(const void *p) { __builtin_prefetch(p); }
INLINE void prefetch_far(const void *p) { __builtin_prefetch(p, 0, 2); }

/* isb takes about as long as other CPUs' pause; yield is much shorter. */
INLINE void cpu_pause(void) { __asm__ volatile("isb"); }
