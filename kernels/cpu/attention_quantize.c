/* Attention with int8 planes: quantizes queries, and turns scores into quantized attention
 * weights. */
#include "attention_planes.h"

#if KV_INT8

enum { QUERY_MAX = 127 * 128, WEIGHT_MAX = 127 * 256 };

/* The terms of x . w that depend only on x: `sum` is the sum of x, `high_sum` that of its high
 * bytes.  Unsigned, because inputs with NaN may overflow. */
INLINE int32_t zero_point_compensation(int32_t sum, int32_t high_sum)
{
    int32_t low_sum = (int32_t)((uint32_t)sum - 256u * (uint32_t)high_sum);
    return (int32_t)(128u * (uint32_t)sum - (uint32_t)(KV_BITS == 16 ? low_sum / 2 : 0));
}

/* ---- Queries: planes [high, low][rows][padded_dim]; scales, compensation [rows] */

typedef struct {
    int8_t *high, *low;
    float *scales;
    int32_t *compensation;
} QueryPlanes;

static QueryPlanes query_planes(const QueryTile *queries)
{
    int rows = rounded_up(queries->count, MAX_PASS_QUERIES);
    int8_t *high = queries->q, *low = high + (int64_t)rows * queries->plan->padded_dim;
    float *scales = (float *)(low + (int64_t)rows * queries->plan->padded_dim);
    return (QueryPlanes){high, low, scales, (int32_t *)(scales + rows)};
}

int64_t query_tile_floats(int count, int padded_dim)
{
    return (int64_t)rounded_up(count, MAX_PASS_QUERIES) * (padded_dim / 2 + 2);
}

void store_query(const QueryTile *queries, int i, const float *x)
{
    const int dim = queries->plan->head_dim, padded_dim = queries->plan->padded_dim;
    QueryPlanes planes = query_planes(queries);
    i32v sizes = splat_int(0), sum = splat_int(0), high_sum = splat_int(0);
    for (int j = 0; j < dim; j += 16)
        sizes = max_int(sizes, abs_bits(load_partial(x + j, dim - j)));
    float largest = float_from_bits(reduce_max_int(sizes));
    int is_finite = largest < INFINITY;
    f32v inverse = splat(is_finite && largest > 0x1p-100f ? QUERY_MAX / largest : 0);
    for (int j = 0; j < padded_dim; j += 16) {
        f32v v = is_finite && j < dim ? load_partial(x + j, dim - j) : splat(0);
        i32v q = round_to_int(v * inverse), high = (q + 128) >> 8;
        sum += q;
        high_sum += high;
        store_low_bytes(planes.high + i * padded_dim + j, high);
        store_low_bytes(planes.low + i * padded_dim + j, q);
    }
    float unit = queries->operation->softcap > 0 ? 1 : LOG2_E;
    planes.scales[i] = largest / QUERY_MAX * queries->operation->scale * unit;
    planes.compensation[i] = zero_point_compensation(reduce_add_int(sum), reduce_add_int(high_sum));
}

ScorePass make_score_pass(const QueryTile *queries, int first, int N, float (*scores)[KV_CHUNK])
{
    QueryPlanes planes = query_planes(queries);
    ScorePass pass = {.N = N, .softcap = queries->operation->softcap, .scores = scores};
    pass.high = planes.high + first * queries->plan->padded_dim;
    pass.low = planes.low + first * queries->plan->padded_dim;
    pass.scales = planes.scales + first;
    pass.compensation = planes.compensation + first;
    for (int n = 0; n < N; n++) {
        pass.firsts[n] = first_visible(queries, first + n);
        pass.lasts[n] = last_visible(queries, first + n);
    }
    return pass;
}

/* ---- Softmax */

/* 2^x for x <= 0, with a relative error of 2e-7; exact for 0.  Below -100 it returns 2^-100:
 * negligible next to 1, yet far from denormal numbers, which are slow. */
INLINE f32v exp2_v(f32v x)
{
    x = max_v(splat(-100.0f), x); /* in this order of arguments NaN passes */
    __m512 whole = _mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    f32v r = x - (f32v)whole;
    f32v y = splat(0x1.5bba14p-10f);
    y = fma_v(y, r, splat(0x1.3cea88p-7f));
    y = fma_v(y, r, splat(0x1.c6b752p-5f));
    y = fma_v(y, r, splat(0x1.ebf9bcp-3f));
    y = fma_v(y, r, splat(0x1.62e42ap-1f));
    y = fma_v(y, r, splat(1.0f));
    return (f32v)_mm512_scalef_ps((__m512)y, whole);
}

INLINE float max_score(const float *scores, int begin, int end)
{
    f32v largest = splat(MASKED);
    for (int at = begin; at < end; at += BLOCK_SIZE)
        largest = max_v(largest, load(scores + at));
    return reduce_max(largest);
}

/* Replaces the scores by exp(score - m) times the values' scales; returns the largest.  *l is the
 * sum of exp(score - m). */
INLINE float exp_scores(
    const float *scales, float *scores, int begin, int end, float m, float *l)
{
    f32v sum = splat(0);
    i32v sizes = splat_int(0);
    for (int at = begin; at < end; at += BLOCK_SIZE) {
        f32v e = exp2_v(load(scores + at) - splat(m));
        sum += e;
        e *= load(scales + at);
        sizes = max_int(sizes, abs_bits(e));
        store(scores + at, e);
    }
    *l = reduce_add(sum);
    return float_from_bits(reduce_max_int(sizes));
}

INLINE __m512i round_scaled(const float *x, f32v inverse)
{
    return (__m512i)round_to_int(load(x) * inverse);
}

/* Stores the bytes of four vectors, which lie interleaved by 128-bit lanes, in order. */
INLINE void store_in_order(int8_t *out, __m512i x)
{
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(out, _mm512_permutexvar_epi32(order, x));
}

/* Splits 64 values, none of them negative, into high and low bytes. */
INLINE void store_planes(
    const float *x, f32v inverse, int8_t *high, int8_t *low, __m512i *sum, __m512i *high_sum)
{
    const __m512i half = _mm512_set1_epi16(128), mask = _mm512_set1_epi16(255);
    const __m512i ones = _mm512_set1_epi16(1);
    __m512i a = _mm512_packs_epi32(round_scaled(x, inverse), round_scaled(x + 16, inverse));
    __m512i b = _mm512_packs_epi32(round_scaled(x + 32, inverse), round_scaled(x + 48, inverse));
    __m512i high_a = _mm512_srai_epi16(_mm512_add_epi16(a, half), 8);
    __m512i high_b = _mm512_srai_epi16(_mm512_add_epi16(b, half), 8);
    __m512i bytes = _mm512_packs_epi16(high_a, high_b);
    *sum = _mm512_dpwssd_epi32(_mm512_dpwssd_epi32(*sum, a, ones), b, ones);
    *high_sum = _mm512_dpbusd_epi32(*high_sum, bytes, _mm512_set1_epi8(1));
    store_in_order(high, bytes);
    store_in_order(low, _mm512_packus_epi16(_mm512_and_si512(a, mask), _mm512_and_si512(b, mask)));
}

void softmax_weights(int N,
                     const KVRange *range,
                     float (*scores)[KV_CHUNK],
                     float *m,
                     float *l,
                     AttentionWeights *weights)
{
    const int begin = chunk_offset(range->begin);
    const int end = rounded_up(chunk_offset(range->end - 1) + 1, BLOCK_SIZE);
    const int first = begin / STEP_POSITIONS * STEP_POSITIONS,
              last = rounded_up(end, STEP_POSITIONS);
    float largest[MAX_PASS_QUERIES];
    for (int n = 0; n < N; n++)
        m[n] = max_score(scores[n], begin, end);
    for (int n = 0; n < N; n++) {
        memset(scores[n] + first, 0, sizeof(float) * (size_t)(begin - first));
        memset(scores[n] + end, 0, sizeof(float) * (size_t)(last - end));
        largest[n] = exp_scores(range->v_scales, scores[n], begin, end, m[n], &l[n]);
    }
    for (int n = 0; n < N; n++) {
        int is_finite = largest[n] < INFINITY;
        f32v inverse = splat(is_finite && largest[n] > 0x1p-100f ? WEIGHT_MAX / largest[n] : 0);
        __m512i sum = _mm512_setzero_si512(), high_sum = sum;
        for (int at = first; at < last; at += STEP_POSITIONS)
            store_planes(scores[n] + at, inverse, weights->high[n] + at, weights->low[n] + at, &sum,
                         &high_sum);
        weights->compensation[n] = zero_point_compensation(reduce_add_int((i32v)sum),
                                                           reduce_add_int((i32v)high_sum));
        weights->scales[n] = is_finite ? largest[n] / WEIGHT_MAX : NAN;
    }
}

#endif
