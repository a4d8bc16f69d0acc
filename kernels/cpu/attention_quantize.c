/* Attention in int8: queries and attention weights quantized to planes of int8. */
#include "attention_int8.h"

#if KV_INTEGERS

enum { MOST_QUERY = 127 * 128, MOST_SHARE = 127 * 256 };

/* x . w for bytes of w that are 0, where x and its high bytes sum up to so much; unsigned, for what is
 * not a number may overflow. */
INLINE int32_t offset_of(int32_t sum, int32_t high_sum)
{
    int32_t low_sum = (int32_t)((uint32_t)sum - 256u * (uint32_t)high_sum);
    return (int32_t)(128u * (uint32_t)sum - (uint32_t)(KV_BITS == 16 ? low_sum / 2 : 0));
}

/* ---- Queries: planes [high, low][rows][padded_dim]; scales [rows]; offsets [rows] */

typedef struct {
    int8_t *high, *low;
    float *scales;
    int32_t *offsets;
} Split;

static Split split_of(const Queries *queries)
{
    int rows = rounded_up(queries->count, MOST_QUERIES);
    int8_t *high = queries->scaled, *low = high + (int64_t)rows * queries->plan->padded_dim;
    float *scales = (float *)(low + (int64_t)rows * queries->plan->padded_dim);
    return (Split){high, low, scales, (int32_t *)(scales + rows)};
}

int64_t queries_floats(int count, int padded_dim)
{
    return (int64_t)rounded_up(count, MOST_QUERIES) * (padded_dim / 2 + 2);
}

void put_query(const Queries *queries, int i, const float *x)
{
    const int dim = queries->plan->head_dim, padded_dim = queries->plan->padded_dim;
    Split split = split_of(queries);
    i32v sizes = splat_int(0), sum = splat_int(0), high_sum = splat_int(0);
    for (int j = 0; j < dim; j += 16)
        sizes = max_int(sizes, size_bits(load_first(x + j, dim - j)));
    float largest = float_of(largest_int(sizes));
    int is_finite = largest < INFINITY;
    f32v inverse = splat(is_finite && largest > 0x1p-100f ? MOST_QUERY / largest : 0);
    for (int j = 0; j < padded_dim; j += 16) {
        f32v v = is_finite && j < dim ? load_first(x + j, dim - j) : splat(0);
        i32v q = to_nearest(v * inverse), high = (q + 128) >> 8;
        sum += q;
        high_sum += high;
        store_bytes(split.high + i * padded_dim + j, high);
        store_bytes(split.low + i * padded_dim + j, q);
    }
    float unit = queries->operation->cap > 0 ? 1 : LOG2_E;
    split.scales[i] = largest / MOST_QUERY * queries->operation->scale * unit;
    split.offsets[i] = offset_of(sum_int(sum), sum_int(high_sum));
}

Scoring scoring_of(const Queries *queries, int first, int N, float (*scores)[CHUNK])
{
    Split split = split_of(queries);
    Scoring scoring = {.N = N, .cap = queries->operation->cap, .scores = scores};
    scoring.high = split.high + first * queries->plan->padded_dim;
    scoring.low = split.low + first * queries->plan->padded_dim;
    scoring.scales = split.scales + first;
    scoring.offsets = split.offsets + first;
    for (int n = 0; n < N; n++) {
        scoring.firsts[n] = first_of(queries, first + n);
        scoring.lasts[n] = last_of(queries, first + n);
    }
    return scoring;
}

/* ---- Shares */

/* 2^x for x <= 0, to 2e-7 of itself; 2^0 is 1.  For x below -100 it is that of -100: nothing beside 1,
 * and far from numbers that are slow because they are denormal. */
INLINE f32v power_of_2(f32v x)
{
    x = max_v(splat(-100.0f), x); /* this way round NaN passes */
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

INLINE float largest_score(const float *scores, int begin, int end)
{
    f32v largest = splat(NOTHING);
    for (int at = begin; at < end; at += BLOCK_SIZE)
        largest = max_v(largest, load(scores + at));
    return largest_v(largest);
}

/* exp(score - m), times the values' scales, in place; their sum before that, and their largest. */
INLINE float weigh_scores(
    const float *scales, float *scores, int begin, int end, float m, float *l)
{
    f32v sum = splat(0);
    i32v sizes = splat_int(0);
    for (int at = begin; at < end; at += BLOCK_SIZE) {
        f32v e = power_of_2(load(scores + at) - splat(m));
        sum += e;
        e *= load(scales + at);
        sizes = max_int(sizes, size_bits(e));
        store(scores + at, e);
    }
    *l = sum_v(sum);
    return float_of(largest_int(sizes));
}

INLINE __m512i to_integers(const float *x, f32v inverse)
{
    return (__m512i)to_nearest(load(x) * inverse);
}

/* Bytes of four vectors, side by side in each lane, to the order of the vectors. */
INLINE void store_in_order(int8_t *out, __m512i x)
{
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(out, _mm512_permutexvar_epi32(order, x));
}

/* Sixty-four values, not negative, to their high and low bytes. */
INLINE void store_split(
    const float *x, f32v inverse, int8_t *high, int8_t *low, __m512i *sum, __m512i *high_sum)
{
    const __m512i half = _mm512_set1_epi16(128), mask = _mm512_set1_epi16(255);
    const __m512i ones = _mm512_set1_epi16(1);
    __m512i a = _mm512_packs_epi32(to_integers(x, inverse), to_integers(x + 16, inverse));
    __m512i b = _mm512_packs_epi32(to_integers(x + 32, inverse), to_integers(x + 48, inverse));
    __m512i high_a = _mm512_srai_epi16(_mm512_add_epi16(a, half), 8);
    __m512i high_b = _mm512_srai_epi16(_mm512_add_epi16(b, half), 8);
    __m512i bytes = _mm512_packs_epi16(high_a, high_b);
    *sum = _mm512_dpwssd_epi32(_mm512_dpwssd_epi32(*sum, a, ones), b, ones);
    *high_sum = _mm512_dpbusd_epi32(*high_sum, bytes, _mm512_set1_epi8(1));
    store_in_order(high, bytes);
    store_in_order(low, _mm512_packus_epi16(_mm512_and_si512(a, mask), _mm512_and_si512(b, mask)));
}

void share_out(
    int N, const Range *range, float (*scores)[CHUNK], float *m, float *l, Shares *shares)
{
    const int begin = in_chunk(range->begin);
    const int end = rounded_up(in_chunk(range->end - 1) + 1, BLOCK_SIZE);
    const int first = begin / STEP * STEP, last = rounded_up(end, STEP);
    float largest[MOST_QUERIES];
    for (int n = 0; n < N; n++)
        m[n] = largest_score(scores[n], begin, end);
    for (int n = 0; n < N; n++) {
        memset(scores[n] + first, 0, sizeof(float) * (size_t)(begin - first));
        memset(scores[n] + end, 0, sizeof(float) * (size_t)(last - end));
        largest[n] = weigh_scores(range->scales[1], scores[n], begin, end, m[n], &l[n]);
    }
    for (int n = 0; n < N; n++) {
        int is_finite = largest[n] < INFINITY;
        f32v inverse = splat(is_finite && largest[n] > 0x1p-100f ? MOST_SHARE / largest[n] : 0);
        __m512i sum = _mm512_setzero_si512(), high_sum = sum;
        for (int at = first; at < last; at += STEP)
            store_split(
                scores[n] + at, inverse, shares->high[n] + at, shares->low[n] + at, &sum, &high_sum);
        shares->offsets[n] = offset_of(sum_int((i32v)sum), sum_int((i32v)high_sum));
        shares->scales[n] = is_finite ? largest[n] / MOST_SHARE : NAN;
    }
}

#endif
