/* AVX-512 with VNNI. */
#include <immintrin.h>

#include "simd_types.h"

INLINE f32v splat(float x) { return (f32v)_mm512_set1_ps(x); }
INLINE i32v splat_int(int32_t x) { return (i32v)_mm512_set1_epi32(x); }

INLINE f32v fma_v(f32v a, f32v b, f32v c)
{
    return (f32v)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}

/* If a or b is NaN, these return b; callers detect NaN by other means. */
INLINE f32v max_v(f32v a, f32v b) { return (f32v)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE f32v min_v(f32v a, f32v b) { return (f32v)_mm512_min_ps((__m512)a, (__m512)b); }

INLINE i32v max_int(i32v a, i32v b)
{
    return (i32v)_mm512_max_epi32((__m512i)a, (__m512i)b);
}

INLINE f32v to_float(i32v x) { return (f32v)_mm512_cvtepi32_ps((__m512i)x); }
INLINE i32v round_to_int(f32v x) { return (i32v)_mm512_cvtps_epi32((__m512)x); }

#define HAS_DOT4 1
#define WEIGHTS_ARE_SIGNED 0

/* c + the dot product of four unsigned bytes of w with four signed bytes of x, in each lane */
INLINE i32v dot4(i32v c, u32v w, i32v x)
{
    return (i32v)_mm512_dpbusd_epi32((__m512i)c, (__m512i)w, (__m512i)x);
}

INLINE f32v load_f16(const uint16_t *p)
{
    return (f32v)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)p));
}

INLINE void store_f16(uint16_t *p, f32v x)
{
    _mm256_storeu_si256((void *)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
}

INLINE f32v load_bf16(const uint16_t *p)
{
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p));
    return (f32v)_mm512_slli_epi32(wide, 16);
}

INLINE f32v load_u8(const uint8_t *p)
{
    return (f32v)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)p)));
}

INLINE f32v load_i8(const uint8_t *p)
{
    return (f32v)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)p)));
}

/* Stores the low byte of each lane. */
INLINE void store_low_bytes(int8_t *p, i32v x)
{
    _mm_storeu_si128((void *)p, _mm512_cvtepi32_epi8((__m512i)x));
}

INLINE float reduce_add(f32v x) { return _mm512_reduce_add_ps((__m512)x); }
INLINE float reduce_max(f32v x) { return _mm512_reduce_max_ps((__m512)x); }
INLINE int32_t reduce_add_int(i32v x) { return _mm512_reduce_add_epi32((__m512i)x); }
INLINE int32_t reduce_max_int(i32v x) { return _mm512_reduce_max_epi32((__m512i)x); }

INLINE void prefetch(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }
INLINE void prefetch_far(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T1); }
INLINE void cpu_pause(void) { _mm_pause(); }
