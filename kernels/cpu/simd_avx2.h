/* AVX2, with VNNI if TIER_AVX_VNNI is defined. */
#include <immintrin.h>

#include "simd_types.h"

INLINE f32v splat(float x) { return (f32v)_mm256_set1_ps(x); }
INLINE i32v splat_int(int32_t x) { return (i32v)_mm256_set1_epi32(x); }

INLINE f32v fma_v(f32v a, f32v b, f32v c)
{
    return (f32v)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}

/* If a or b is NaN, these return b; callers detect NaN by other means. */
INLINE f32v max_v(f32v a, f32v b) { return (f32v)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE f32v min_v(f32v a, f32v b) { return (f32v)_mm256_min_ps((__m256)a, (__m256)b); }

INLINE i32v max_int(i32v a, i32v b) { return (i32v)_mm256_max_epi32((__m256i)a, (__m256i)b); }

INLINE f32v to_float(i32v x) { return (f32v)_mm256_cvtepi32_ps((__m256i)x); }
INLINE i32v round_to_int(f32v x) { return (i32v)_mm256_cvtps_epi32((__m256)x); }

#define HAS_DOT4 0
#define WEIGHTS_ARE_SIGNED 1

/* c + the dot product of two int16 of w with two of x, in each lane */
INLINE i32v madd(i32v c, u32v w, i32v x)
{
#ifdef TIER_AVX_VNNI
    return (i32v)_mm256_dpwssd_avx_epi32((__m256i)c, (__m256i)w, (__m256i)x);
#else
    c = (i32v)_mm256_add_epi32((__m256i)c, _mm256_madd_epi16((__m256i)w, (__m256i)x));
    __asm__("" : "+x"(c)); /* no reordering by gcc: it takes too many registers */
    return c;
#endif
}

/* Adds products of bytes to sums; w is unsigned.  VNNI: four products in each 32 bits.  Otherwise:
 * two in each 16 bits with w below 128; the caller widens the sums before they overflow. */
INLINE i32v add_i8_products(i32v sums, u32v w, i32v x)
{
#ifdef TIER_AVX_VNNI
    return (i32v)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)w, (__m256i)x);
#else
    sums = (i32v)_mm256_add_epi16((__m256i)sums, _mm256_maddubs_epi16((__m256i)w, (__m256i)x));
    __asm__("" : "+x"(sums)); /* as in madd */
    return sums;
#endif
}

/* c + the sums of add_i8_products */
INLINE i32v widen_i8_sums(i32v c, i32v sums)
{
#ifdef TIER_AVX_VNNI
    return c + sums;
#else
    return c + (i32v)_mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16(1));
#endif
}

/* The absolute value of bytes, and x with their signs: |w| sign(x, w) = w x. */
INLINE u32v abs_i8(u32v w) { return (u32v)_mm256_abs_epi8((__m256i)w); }
INLINE i32v sign_i8(i32v x, u32v w) { return (i32v)_mm256_sign_epi8((__m256i)x, (__m256i)w); }

INLINE f32v load_f16(const uint16_t *p)
{
    return (f32v)_mm256_cvtph_ps(_mm_loadu_si128((const void *)p));
}

INLINE void store_f16(uint16_t *p, f32v x)
{
    _mm_storeu_si128((void *)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
}

INLINE f32v load_bf16(const uint16_t *p)
{
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p));
    return (f32v)_mm256_slli_epi32(wide, 16);
}

INLINE f32v load_u8(const uint8_t *p)
{
    return (f32v)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)p)));
}

INLINE f32v load_i8(const uint8_t *p)
{
    return (f32v)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)p)));
}

/* Stores the low byte of each lane. */
INLINE void store_low_bytes(int8_t *p, i32v x)
{
    const __m256i first = _mm256_set1_epi32(0x0c080400);
    __m256i bytes = _mm256_shuffle_epi8((__m256i)x, first);
    int32_t halves[2] = {_mm256_extract_epi32(bytes, 0), _mm256_extract_epi32(bytes, 4)};
    memcpy(p, halves, sizeof halves);
}

INLINE float reduce_add(f32v x)
{
    __m128 s = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

INLINE float reduce_max(f32v x)
{
    __m128 s = _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}

INLINE int32_t reduce_add_int(i32v x)
{
    __m128i s = _mm256_extracti128_si256((__m256i)x, 1);
    s = _mm_add_epi32(_mm256_castsi256_si128((__m256i)x), s);
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

INLINE int32_t reduce_max_int(i32v x)
{
    __m128i s = _mm256_extracti128_si256((__m256i)x, 1);
    s = _mm_max_epi32(_mm256_castsi256_si128((__m256i)x), s);
    s = _mm_max_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

INLINE void prefetch(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }
INLINE void prefetch_far(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T1); }
INLINE void cpu_pause(void) { _mm_pause(); }
