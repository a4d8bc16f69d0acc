/* AVX-512, VNNI and AMX for a CPU with AVX2: the intrinsics that kernels/cpu uses, computed in two
 * halves or element by element, so that these kernels can be tested anywhere.
 *
 * Instructions are defined in Intel 64 and IA-32 Architectures Software Developer's Manual, volume
 * 2. Where an AMX instruction would fault, this aborts. */
#ifndef EMULATED_IMMINTRIN_H
#define EMULATED_IMMINTRIN_H

#include_next <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef int8_t Bytes __attribute__((vector_size(64)));
typedef int16_t Words __attribute__((vector_size(64)));
typedef uint16_t UnsignedWords __attribute__((vector_size(64)));
typedef int32_t Integers32 __attribute__((vector_size(64)));
typedef uint32_t Unsigned32 __attribute__((vector_size(64)));
typedef int64_t Integers64 __attribute__((vector_size(64)));
typedef uint64_t Unsigned64 __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64)));

typedef union {
    __m512i whole;
    __m512 floats;
    __m256i halves[2];
    __m256 float_halves[2];
    int8_t bytes[64];
    int32_t integers[16];
    float singles[16];
} Register;

/* Real calls: inlined, unrolled kernels would take minutes to compile. */
#define EMULATED static __attribute__((noinline, unused))

/* ---- Both halves */

#define HALF(x, i) ((Register){.whole = (__m512i)(x)}.halves[i])
#define FLOAT_HALF(x, i) ((Register){.whole = (__m512i)(x)}.float_halves[i])
#define BOTH(half, a, b)                                                                           \
    ((Register){.halves = {half(HALF(a, 0), HALF(b, 0)),                                           \
                           half(HALF(a, 1), HALF(b, 1))}}                                          \
         .whole)
#define BOTH_FLOATS(half, a, b)                                                                    \
    ((Register){.float_halves = {half(FLOAT_HALF(a, 0), FLOAT_HALF(b, 0)),                         \
                                 half(FLOAT_HALF(a, 1), FLOAT_HALF(b, 1))}}                        \
         .floats)

#define _mm512_max_epi32(a, b) BOTH(_mm256_max_epi32, a, b)
#define _mm512_mul_epi32(a, b) BOTH(_mm256_mul_epi32, a, b)
#define _mm512_mullo_epi16(a, b) BOTH(_mm256_mullo_epi16, a, b)
#define _mm512_packs_epi16(a, b) BOTH(_mm256_packs_epi16, a, b)
#define _mm512_packs_epi32(a, b) BOTH(_mm256_packs_epi32, a, b)
#define _mm512_packus_epi16(a, b) BOTH(_mm256_packus_epi16, a, b)
#define _mm512_shuffle_epi8(a, b) BOTH(_mm256_shuffle_epi8, a, b)
#define _mm512_max_ps(a, b) BOTH_FLOATS(_mm256_max_ps, a, b)
#define _mm512_min_ps(a, b) BOTH_FLOATS(_mm256_min_ps, a, b)

#define _mm512_cvtepi32_ps(x)                                                                      \
    ((Register){.float_halves = {_mm256_cvtepi32_ps(HALF(x, 0)),                                   \
                                 _mm256_cvtepi32_ps(HALF(x, 1))}}                                  \
         .floats)
#define _mm512_cvtps_epi32(x)                                                                      \
    ((Register){.halves = {_mm256_cvtps_epi32(FLOAT_HALF(x, 0)),                                   \
                           _mm256_cvtps_epi32(FLOAT_HALF(x, 1))}}                                  \
         .whole)
#define _mm512_roundscale_ps(x, how)                                                               \
    ((Register){.float_halves = {_mm256_round_ps(FLOAT_HALF(x, 0), how),                           \
                                 _mm256_round_ps(FLOAT_HALF(x, 1), how)}}                          \
         .floats)

#define _mm512_fmadd_ps emulated_fmadd_ps
EMULATED __m512 emulated_fmadd_ps(__m512 x, __m512 y, __m512 z)
{
    Register a = {.floats = x}, b = {.floats = y}, c = {.floats = z};
    for (int i = 0; i < 2; i++)
        c.float_halves[i] = _mm256_fmadd_ps(
            a.float_halves[i], b.float_halves[i], c.float_halves[i]);
    return c.floats;
}

/* Conversions from and to vectors of half or a quarter of the width. */
#define QUARTER(x, i) _mm256_extracti128_si256(x, i)
#define _mm512_cvtepu16_epi32(x)                                                                   \
    ((Register){.halves = {_mm256_cvtepu16_epi32(QUARTER(x, 0)),                                   \
                           _mm256_cvtepu16_epi32(QUARTER(x, 1))}}                                  \
         .whole)
#define _mm512_cvtph_ps(x)                                                                         \
    ((Register){.float_halves = {_mm256_cvtph_ps(QUARTER(x, 0)),                                   \
                                 _mm256_cvtph_ps(QUARTER(x, 1))}}                                  \
         .floats)
#define _mm512_cvtps_ph(x, how)                                                                    \
    _mm256_set_m128i(_mm256_cvtps_ph(FLOAT_HALF(x, 1), how), _mm256_cvtps_ph(FLOAT_HALF(x, 0), how))
#define _mm512_cvtepu8_epi32(x)                                                                    \
    ((Register){.halves = {_mm256_cvtepu8_epi32(x),                                                \
                           _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8))}}                            \
         .whole)
#define _mm512_cvtepi8_epi32(x)                                                                    \
    ((Register){.halves = {_mm256_cvtepi8_epi32(x),                                                \
                           _mm256_cvtepi8_epi32(_mm_srli_si128(x, 8))}}                            \
         .whole)

/* ---- GNU vector extensions */

#define _mm512_add_epi16(a, b) ((__m512i)((UnsignedWords)(a) + (UnsignedWords)(b)))
#define _mm512_add_epi64(a, b) ((__m512i)((Unsigned64)(a) + (Unsigned64)(b)))
#define _mm512_and_si512(a, b) ((__m512i)((Integers64)(a) & (Integers64)(b)))
#define _mm512_slli_epi32(a, n) ((__m512i)((Unsigned32)(a) << (n)))
#define _mm512_slli_epi64(a, n) ((__m512i)((Unsigned64)(a) << (n)))
#define _mm512_srli_epi16(a, n) ((__m512i)((UnsignedWords)(a) >> (n)))
#define _mm512_srli_epi64(a, n) ((__m512i)((Unsigned64)(a) >> (n)))
#define _mm512_srai_epi16(a, n) ((__m512i)((Words)(a) >> (n)))
#define _mm512_srai_epi64(a, n) ((__m512i)((Integers64)(a) >> (n)))
#define _mm512_setzero_si512() ((__m512i)(Integers64){0})
#define _mm512_set1_epi8(x) ((__m512i)((Bytes){0} + (int8_t)(x)))
#define _mm512_set1_epi16(x) ((__m512i)((Words){0} + (int16_t)(x)))
#define _mm512_set1_epi32(x) ((__m512i)((Integers32){0} + (int32_t)(x)))
#define _mm512_set4_epi32(d, c, b, a)                                                              \
    ((__m512i)(Integers32){a, b, c, d, a, b, c, d, a, b, c, d, a, b, c, d})
#define _mm512_setr_epi32(...) ((__m512i)(Integers32){__VA_ARGS__})
#define _mm512_storeu_si512(p, x) memcpy(p, &(Register){.whole = (x)}, 64)

/* ---- Element by element */

#define _mm512_set1_ps emulated_set1_ps
EMULATED __m512 emulated_set1_ps(float x)
{
    return (__m512)(Floats){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
}

#define _mm512_scalef_ps emulated_scalef_ps
EMULATED __m512 emulated_scalef_ps(__m512 x, __m512 power)
{
    Register a = {.floats = x}, b = {.floats = power};
    for (int i = 0; i < 16; i++)
        a.singles[i] = isnan(b.singles[i]) ? b.singles[i]
                                           : ldexpf(a.singles[i], (int)floorf(b.singles[i]));
    return a.floats;
}

#define _mm512_cvtepi32_epi8 emulated_cvtepi32_epi8
EMULATED __m128i emulated_cvtepi32_epi8(__m512i x)
{
    Register a = {.whole = x};
    int8_t bytes[16];
    for (int i = 0; i < 16; i++)
        bytes[i] = a.bytes[4 * i];
    return _mm_loadu_si128((const void *)bytes);
}

#define _mm512_permutexvar_epi32 emulated_permutexvar_epi32
EMULATED __m512i emulated_permutexvar_epi32(__m512i order, __m512i x)
{
    Register at = {.whole = order}, a = {.whole = x}, out;
    for (int i = 0; i < 16; i++)
        out.integers[i] = a.integers[at.integers[i] & 15];
    return out.whole;
}

#define _mm512_mask_blend_epi32 emulated_mask_blend_epi32
EMULATED __m512i emulated_mask_blend_epi32(__mmask16 mask, __m512i a, __m512i b)
{
    Register out = {.whole = a}, other = {.whole = b};
    for (int i = 0; i < 16; i++)
        if (mask >> i & 1)
            out.integers[i] = other.integers[i];
    return out.whole;
}

#define _mm512_mask_storeu_epi8 emulated_mask_storeu_epi8
EMULATED void emulated_mask_storeu_epi8(void *p, __mmask64 mask, __m512i x)
{
    Register a = {.whole = x};
    for (int i = 0; i < 64; i++)
        if (mask >> i & 1)
            ((int8_t *)p)[i] = a.bytes[i];
}

#define _mm512_mask_shuffle_epi8 emulated_mask_shuffle_epi8
#define _mm512_maskz_shuffle_epi8(mask, x, places)                                                 \
    emulated_mask_shuffle_epi8(_mm512_setzero_si512(), mask, x, places)
EMULATED __m512i emulated_mask_shuffle_epi8(
    __m512i other, __mmask64 mask, __m512i x, __m512i places)
{
    Register out = {.whole = other};
    emulated_mask_storeu_epi8(out.bytes, mask, _mm512_shuffle_epi8(x, places));
    return out.whole;
}

/* ---- Reductions, in the order that compilers use */

#define _mm512_reduce_add_ps emulated_reduce_add_ps
EMULATED float emulated_reduce_add_ps(__m512 x)
{
    Register a = {.floats = x};
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            a.singles[i] += a.singles[i + half];
    return a.singles[0];
}

#define _mm512_reduce_max_ps emulated_reduce_max_ps
EMULATED float emulated_reduce_max_ps(__m512 x)
{
    Register a = {.floats = x};
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            a.singles[i] = a.singles[i] > a.singles[i + half] ? a.singles[i] : a.singles[i + half];
    return a.singles[0];
}

#define _mm512_reduce_add_epi32 emulated_reduce_add_epi32
EMULATED int emulated_reduce_add_epi32(__m512i x)
{
    Register a = {.whole = x};
    uint32_t sum = 0;
    for (int i = 0; i < 16; i++)
        sum += (uint32_t)a.integers[i];
    return (int)sum;
}

#define _mm512_reduce_max_epi32 emulated_reduce_max_epi32
EMULATED int emulated_reduce_max_epi32(__m512i x)
{
    Register a = {.whole = x};
    int largest = a.integers[0];
    for (int i = 1; i < 16; i++)
        largest = a.integers[i] > largest ? a.integers[i] : largest;
    return largest;
}

/* ---- Dot products of integers in each 32-bit element */

static inline __m256i low_bytes_of(__m256i x, int is_signed)
{
    return is_signed ? _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8)
                     : _mm256_and_si256(x, _mm256_set1_epi16(255));
}

static inline __m256i high_bytes_of(__m256i x, int is_signed)
{
    return is_signed ? _mm256_srai_epi16(x, 8) : _mm256_srli_epi16(x, 8);
}

/* c + the dot product of four bytes of a with four signed bytes of b */
static inline __m256i multiply_half(__m256i c, __m256i a, int is_signed, __m256i b)
{
    __m256i even = _mm256_madd_epi16(low_bytes_of(a, is_signed), low_bytes_of(b, 1));
    __m256i odd = _mm256_madd_epi16(high_bytes_of(a, is_signed), high_bytes_of(b, 1));
    return _mm256_add_epi32(c, _mm256_add_epi32(even, odd));
}

EMULATED __m512i multiply_bytes(__m512i c, __m512i a, int is_signed, __m512i b)
{
    Register sum = {.whole = c};
    for (int i = 0; i < 2; i++)
        sum.halves[i] = multiply_half(sum.halves[i], HALF(a, i), is_signed, HALF(b, i));
    return sum.whole;
}

#define _mm256_dpbusd_avx_epi32(c, a, b) multiply_half(c, a, 0, b)
#define _mm256_dpwssd_avx_epi32(c, a, b) _mm256_add_epi32(c, _mm256_madd_epi16(a, b))

#define _mm512_dpbusd_epi32(c, a, b) multiply_bytes(c, a, 0, b)
#define _mm512_dpwssd_epi32(c, a, b)                                                               \
    ((__m512i)((Unsigned32)(c) + (Unsigned32)BOTH(_mm256_madd_epi16, a, b)))

/* ---- AMX tiles */

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TileConfig;

/* One for each thread, shared by all files of the kernels. */
__attribute__((weak)) __thread TileConfig emulated_config;
__attribute__((weak)) __thread Register emulated_tiles[8][16];

static inline void expect(int holds)
{
    if (!holds)
        abort();
}

#define _tile_loadconfig emulated_loadconfig
static inline void emulated_loadconfig(const void *config)
{
    memcpy(&emulated_config, config, sizeof emulated_config);
    expect(emulated_config.palette == 1 && emulated_config.start_row == 0);
    for (int i = 0; i < 8; i++)
        expect(emulated_config.rows[i] <= 16 && emulated_config.row_bytes[i] <= 64);
    memset(emulated_tiles, 0, sizeof emulated_tiles);
}

#define _tile_release() memset(&emulated_config, 0, sizeof emulated_config)

#define _tile_zero emulated_zero
static inline void emulated_zero(int tile)
{
    expect(emulated_config.rows[tile] > 0);
    memset(emulated_tiles[tile], 0, sizeof emulated_tiles[tile]);
}

#define _tile_loadd emulated_loadd
static inline void emulated_loadd(int tile, const void *base, int64_t stride)
{
    emulated_zero(tile);
    for (int r = 0; r < emulated_config.rows[tile]; r++)
        memcpy(emulated_tiles[tile][r].bytes, (const char *)base + r * stride,
               emulated_config.row_bytes[tile]);
}

#define _tile_stored emulated_stored
static inline void emulated_stored(int tile, void *base, int64_t stride)
{
    expect(emulated_config.rows[tile] > 0);
    for (int r = 0; r < emulated_config.rows[tile]; r++)
        memcpy((char *)base + r * stride, emulated_tiles[tile][r].bytes,
               emulated_config.row_bytes[tile]);
}

#define _tile_dpbssd(sums, a, b) multiply_tiles_of_bytes(sums, a, b, 1)
#define _tile_dpbsud(sums, a, b) multiply_tiles_of_bytes(sums, a, b, 0)
static inline void multiply_tiles_of_bytes(int sums, int a, int b, int b_is_signed)
{
    const TileConfig *is = &emulated_config;
    expect(sums != a && sums != b && a != b && is->rows[sums] > 0);
    expect(is->rows[sums] == is->rows[a] && is->row_bytes[sums] == is->row_bytes[b]);
    expect(is->row_bytes[a] == 4 * is->rows[b]);
    for (int m = 0; m < is->rows[sums]; m++)
        for (int k = 0; k < is->rows[b]; k++)
            emulated_tiles[sums][m].whole = multiply_bytes(
                emulated_tiles[sums][m].whole, emulated_tiles[b][k].whole, b_is_signed,
                _mm512_set1_epi32(emulated_tiles[a][m].integers[k]));
}

/* Grants ARCH_REQ_XCOMP_PERM. */
#define syscall(number, ...) ((number) == SYS_arch_prctl ? 0 : syscall(number, __VA_ARGS__))

#endif
