/* Few rows: multiplies weights as they lie in memory, by int8 dot products of four, and sums in 64
 * bits. */
#ifdef TIER_AMX
#include "linear_amx_scales.h"
#include "linear_epilogue.h"

typedef struct {
    __m512i even, odd; /* 64-bit sums of eight weight rows each */
} Totals;

/* totals += a * b, lane by lane.  odd_b has b's odd lanes in its even lanes. */
INLINE void add_scaled(Totals *totals, i32v a, i32v b, __m512i odd_b)
{
    __m512i odd_a = _mm512_srli_epi64((__m512i)a, 32);
    totals->even = _mm512_add_epi64(totals->even, _mm512_mul_epi32((__m512i)a, (__m512i)b));
    totals->odd = _mm512_add_epi64(totals->odd, _mm512_mul_epi32(odd_a, odd_b));
}

/* The totals of sixteen weight rows, without their last `shift` bits. */
INLINE f32v shift_totals(const Totals *totals, const int shift)
{
    __m512i even = _mm512_srai_epi64(totals->even, shift),
            odd = _mm512_srai_epi64(totals->odd, shift);
    return to_float((i32v)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32)));
}

/* totals += D (q . x) + M sum(x) over words first .. last - 1 of a block, for R rows. */
INLINE void accumulate_half(
    const int R,
    const int first,
    const int last,
    const u32v *q,
    i32v D,
    i32v M,
    const int32_t *words,
    const int32_t *sums,
    Totals *totals)
{
    __m512i odd_D = _mm512_srli_epi64((__m512i)D, 32), odd_M = _mm512_srli_epi64((__m512i)M, 32);
    i32v high[GEMV_ROWS], low[GEMV_ROWS];
    UNROLL for (int r = 0; r < R; r++) high[r] = low[r] = splat_int(0);
    UNROLL for (int j = first; j < last; j++) UNROLL for (int r = 0; r < R; r++) {
        high[r] = dot4(high[r], q[j], splat_int(words[16 * r + j]));
        low[r] = dot4(low[r], q[j], splat_int(words[16 * (R + r) + j]));
    }
    UNROLL for (int r = 0; r < R; r++) {
        i32v sum = splat_int(sums[r]);
        if (last - first == 8)
            sum += splat_int(sums[R + r]);
        add_scaled(&totals[r], (high[r] << 8) + low[r], D, odd_D);
        add_scaled(&totals[r], sum, M, odd_M);
    }
}

/* y[r][0..15] of one group and R <= GEMV_ROWS rows. */
INLINE void gemv(
    const int format, const int R, const uint8_t *group, int columns, const int32_t *tile, float *y)
{
    const size_t size = block_bytes(format);
    const int num_blocks = columns / BLOCK_COLUMNS,
              segment = segment_steps(columns) * STEP_COLUMNS / BLOCK_COLUMNS;
    const int32_t *sums = tile + sums_at(columns, R);
    const float *scale = (const float *)(tile + scales_at(columns, R));
    const f32v inverse = inverse_units(group);
    const uint8_t *blocks = group + UNITS_BYTES;
    f32v sum[GEMV_ROWS];
    UNROLL for (int r = 0; r < R; r++) sum[r] = splat(0);
    for (int k = 0; k < num_blocks; scale += R) {
        Totals totals[GEMV_ROWS];
        UNROLL for (int r = 0; r < R; r++) totals[r].even = totals[r].odd = _mm512_setzero_si512();
        int end = k + segment < num_blocks ? k + segment : num_blocks;
        for (; k < end; k++, sums += 2 * R) {
            const uint8_t *w = blocks + block_offset(format, k),
                          *head = blocks + head_offset(format, k);
            const int32_t *words = tile + k / 2 * 32 * R + k % 2 * 8;
            u32v q[8];
            i32v D, M;
            UNROLL for (size_t u = 0; u < size; u += 64) {
                prefetch(w + PREFETCH_L1 + u);
                prefetch_far(w + PREFETCH_L2 + u);
            }
            UNROLL for (int j = 0; j < 4; j++) unpack_words(format, w, j, 0, &q[j], &q[j + 4]);
            integer_scales(format, w, head, inverse, 0, &D, &M);
            if (format != Q6_K) {
                accumulate_half(R, 0, 8, q, D, M, words, sums, totals);
                continue;
            }
            accumulate_half(R, 0, 4, q, D, M, words, sums, totals);
            integer_scales(format, w, head, inverse, 1, &D, &M);
            accumulate_half(R, 4, 8, q, D, M, words, sums + R, totals);
        }
        UNROLL for (int r = 0; r < R; r++) {
            f32v total = shift_totals(&totals[r], total_shift(format));
            sum[r] = fma_v(total, splat(scale[r]), sum[r]);
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        store(y + GROUP_ROWS * r, sum[r] * total_units(format, group));
}

/* ---- One function for each format and number of rows */

typedef void (*Gemv)(const uint8_t *group, int columns, const int32_t *tile, float *y);

#define DEFINE_GEMV(format, R)                                                                     \
    static void format##_##R(const uint8_t *group, int columns, const int32_t *tile, float *y)     \
    {                                                                                              \
        gemv(format, R, group, columns, tile, y);                                                  \
    }

#define DEFINE_GEMVS(format)                                                                       \
    DEFINE_GEMV(format, 1)                                                                         \
    DEFINE_GEMV(format, 2)                                                                         \
    DEFINE_GEMV(format, 3)                                                                         \
    DEFINE_GEMV(format, 4)

DEFINE_GEMVS(Q4_0)
DEFINE_GEMVS(Q4_1)
DEFINE_GEMVS(Q5_0)
DEFINE_GEMVS(Q5_1)
DEFINE_GEMVS(Q8_0)
DEFINE_GEMVS(Q4_K)
DEFINE_GEMVS(Q5_K)
DEFINE_GEMVS(Q6_K)

#define NAMES(format) [format] = {format##_1, format##_2, format##_3, format##_4}
static const Gemv gemvs[NUM_FORMATS][GEMV_ROWS] = {
    NAMES(Q4_0), NAMES(Q4_1), NAMES(Q5_0), NAMES(Q5_1),
    NAMES(Q8_0), NAMES(Q4_K), NAMES(Q5_K), NAMES(Q6_K),
};

void run_gemv(const Operation *operation, WeightGroups pair, int row, int R, const int32_t *tile)
{
    const WeightPart *part = pair.part;
    size_t size = group_bytes(part->format, part->columns);
    float y[2 * GEMV_ROWS * GROUP_ROWS] __attribute__((aligned(64)));
    for (int g = 0; g < pair.num_groups; g++)
        gemvs[part->format][R - 1](pair.w + (size_t)g * size, part->columns, tile,
                                   y + GROUP_ROWS * R * g);
    apply_epilogue_rows(operation, pair, row, R, y, R);
}

#endif
