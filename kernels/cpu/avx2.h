/* AVX2, with VNNI where TIER_AVX_VNNI says so: two registers a vector. */
#include <immintrin.h>

typedef union {
    f32x16 f;
    i32x16 i;
    __m256 ps[2];
    __m256i si[2];
} Halves;

INLINE f32x16 splat(float x)
{
    Halves h = {.ps = {_mm256_set1_ps(x), _mm256_set1_ps(x)}};
    return h.f;
}

INLINE i32x16 splat_int(int32_t x)
{
    Halves h = {.si = {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}};
    return h.i;
}

#define EACH_HALF(expression)                                                                      \
    for (int i = 0; i < 2; i++)                                                                    \
    expression

INLINE f32x16 fma16(f32x16 a, f32x16 b, f32x16 c)
{
    Halves x = {.f = a}, y = {.f = b}, z = {.f = c};
    EACH_HALF(z.ps[i] = _mm256_fmadd_ps(x.ps[i], y.ps[i], z.ps[i]));
    return z.f;
}

INLINE f32x16 max16(f32x16 a, f32x16 b)
{
    Halves x = {.f = a}, y = {.f = b};
    EACH_HALF(y.ps[i] = _mm256_max_ps(x.ps[i], y.ps[i]));
    return y.f;
}

INLINE f32x16 min16(f32x16 a, f32x16 b)
{
    Halves x = {.f = a}, y = {.f = b};
    EACH_HALF(y.ps[i] = _mm256_min_ps(x.ps[i], y.ps[i]));
    return y.f;
}

INLINE i32x16 max_int(i32x16 a, i32x16 b)
{
    Halves x = {.i = a}, y = {.i = b};
    EACH_HALF(y.si[i] = _mm256_max_epi32(x.si[i], y.si[i]));
    return y.i;
}

INLINE f32x16 to_float(i32x16 a)
{
    Halves x = {.i = a};
    EACH_HALF(x.ps[i] = _mm256_cvtepi32_ps(x.si[i]));
    return x.f;
}

INLINE i32x16 to_nearest(f32x16 a)
{
    Halves x = {.f = a};
    EACH_HALF(x.si[i] = _mm256_cvtps_epi32(x.ps[i]));
    return x.i;
}

/* Without VNNI by 16-bit products of the even and the odd bytes: maddubs would saturate. */
INLINE __m256i dot4_half(__m256i c, __m256i w, __m256i x)
{
#ifdef TIER_AVX_VNNI
    return _mm256_dpbusd_avx_epi32(c, w, x);
#else
    __m256i even = _mm256_and_si256(w, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(w, 8);
    __m256i x_even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), x_odd = _mm256_srai_epi16(x, 8);
    c = _mm256_add_epi32(c, _mm256_madd_epi16(even, x_even));
    return _mm256_add_epi32(c, _mm256_madd_epi16(odd, x_odd));
#endif
}

INLINE i32x16 dot4(i32x16 c, u32x16 w, i32x16 x)
{
    Halves sum = {.i = c}, a = {.i = (i32x16)w}, b = {.i = x};
    EACH_HALF(sum.si[i] = dot4_half(sum.si[i], a.si[i], b.si[i]));
    return sum.i;
}

INLINE f32x16 load_half(const uint16_t *p)
{
    Halves h;
    EACH_HALF(h.ps[i] = _mm256_cvtph_ps(_mm_loadu_si128((const void *)(p + 8 * i))));
    return h.f;
}

INLINE void store_half(uint16_t *p, f32x16 a)
{
    Halves x = {.f = a};
    EACH_HALF(_mm_storeu_si128((void *)(p + 8 * i),
                               _mm256_cvtps_ph(x.ps[i], _MM_FROUND_TO_NEAREST_INT)));
}

INLINE f32x16 load_bfloat(const uint16_t *p)
{
    Halves h;
    EACH_HALF(h.si[i] = _mm256_slli_epi32(
                  _mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)(p + 8 * i))), 16));
    return h.f;
}

INLINE f32x16 load_unsigned_bytes(const uint8_t *p)
{
    Halves h;
    EACH_HALF(h.si[i] = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)(p + 8 * i))));
    return to_float(h.i);
}

INLINE f32x16 load_signed_bytes(const uint8_t *p)
{
    Halves h;
    EACH_HALF(h.si[i] = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)(p + 8 * i))));
    return to_float(h.i);
}

INLINE void store_bytes(int8_t *p, i32x16 x)
{
    for (int i = 0; i < 16; i++)
        p[i] = (int8_t)x[i];
}

INLINE float sum16(f32x16 a)
{
    Halves x = {.f = a};
    __m256 s = _mm256_add_ps(x.ps[0], x.ps[1]);
    __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_add_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_add_ss(t, _mm_shuffle_ps(t, t, 1)));
}

INLINE float largest16(f32x16 a)
{
    Halves x = {.f = a};
    __m256 s = _mm256_max_ps(x.ps[0], x.ps[1]);
    __m128 t = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_max_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_max_ss(t, _mm_shuffle_ps(t, t, 1)));
}

INLINE int32_t sum_int(i32x16 a)
{
    Halves x = {.i = a};
    __m256i s = _mm256_add_epi32(x.si[0], x.si[1]);
    __m128i t = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(t, _mm_shuffle_epi32(t, 0xb1)));
}

INLINE int32_t largest_int(i32x16 a)
{
    Halves x = {.i = a};
    __m256i s = _mm256_max_epi32(x.si[0], x.si[1]);
    __m128i t = _mm_max_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    t = _mm_max_epi32(t, _mm_shuffle_epi32(t, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(t, _mm_shuffle_epi32(t, 0xb1)));
}

INLINE void prefetch(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }
INLINE void prefetch_far(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T1); }
INLINE void pause_briefly(void) { _mm_pause(); }
