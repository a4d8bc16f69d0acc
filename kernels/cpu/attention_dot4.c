/* Attention in int8, of up to eight queries, by dot products of four bytes. */
#include "attention_int8.h"

#if KV_INTEGERS

enum { WORD = 4 /* bytes that a product sums up */ };

INLINE i32v word_at(const int8_t *bytes)
{
    int32_t word;
    memcpy(&word, bytes, sizeof word);
    return splat_int(word);
}

/* ---- Scores */

INLINE void add_products(Sums *sums, u32v high, u32v low, i32v x_high, i32v x_low)
{
    sums->top = dot4(sums->top, high, x_high);
    sums->middle = dot4(sums->middle, high, x_low);
    if (KV_BITS == 16)
        sums->other = dot4(sums->other, low, x_high);
}

/* Meanwhile the values of this block and the keys of the next one are fetched, for blocks lie scattered,
 * and line by line, for the CPU itself fetches what seems to come next. */
INLINE void score_in_vectors(const int N, const Scoring *scoring, const Range *range, int dim)
{
    const int plane = dim * BLOCK_SIZE;
    for (int position = range->begin; position < range->end; position += BLOCK_SIZE) {
        int next = position + BLOCK_SIZE < range->end ? position + BLOCK_SIZE : position;
        const uint8_t *high = block_of(range, range->k, position);
        const uint8_t *values = block_of(range, range->v, position);
        const uint8_t *keys = block_of(range, range->k, next);
        Sums sums[SOME];
        UNROLL for (int n = 0; n < N; n++) sums[n] = no_sums();
        for (int i = 0; i < dim; i += WORD, high += 64) {
            UNROLL for (int u = 0; u < KV_BYTES; u++, values += 64, keys += 64) {
                prefetch(values);
                prefetch(keys);
            }
            u32v low = KV_BITS == 16 ? load_bytes(high + plane) : (u32v){0};
            UNROLL for (int n = 0; n < N; n++) add_products(
                &sums[n], load_bytes(high), low, word_at(scoring->high + n * dim + i),
                word_at(scoring->low + n * dim + i));
        }
        f32v k_scales = load(range->scales[0] + in_chunk(position));
        int all = all_see(scoring, position);
        UNROLL for (int n = 0; n < N; n++) put_scores(scoring, n, position, all, k_scales, &sums[n]);
    }
}

/* ---- Values */

INLINE void weigh_in_vectors(
    const int N, const Range *range, int dim, const Shares *shares, float *o)
{
    const int plane = dim * BLOCK_SIZE;
    for (int i = 0; i < dim; i += 16) {
        Sums sums[SOME];
        UNROLL for (int n = 0; n < N; n++) sums[n] = no_sums();
        for (int position = range->begin; position < range->end; position += BLOCK_SIZE) {
            const uint8_t *v = block_of(range, range->v, position) + i * BLOCK_SIZE;
            for (int u = 0; u < BLOCK_SIZE; u += WORD, v += 64) {
                int at = in_chunk(position + u);
                u32v low = KV_BITS == 16 ? load_bytes(v + plane) : (u32v){0};
                UNROLL for (int n = 0; n < N; n++) add_products(
                    &sums[n], load_bytes(v), low, word_at(shares->high[n] + at),
                    word_at(shares->low[n] + at));
            }
        }
        UNROLL for (int n = 0; n < N; n++) store(
            o + n * dim + i, value_of(&sums[n], shares->offsets[n]) * splat(shares->scales[n]));
    }
}

INLINE void attend_in_vectors(
    const int N, const Queries *queries, int first, const Range *range, float *m, float *l, float *o)
{
    const int dim = queries->plan->padded_dim;
    float scores[SOME][CHUNK] __attribute__((aligned(64)));
    Shares shares __attribute__((aligned(64)));
    Scoring scoring = scoring_of(queries, first, N, scores);
    score_in_vectors(N, &scoring, range, dim);
    share_out(N, range, scores, m, l, &shares);
    weigh_in_vectors(N, range, dim, &shares, o);
}

void attend_dot4(
    int N, const Queries *queries, int first, const Range *range, float *m, float *l, float *o)
{
    switch (N) {
    case 1: attend_in_vectors(1, queries, first, range, m, l, o); break;
    case 2: attend_in_vectors(2, queries, first, range, m, l, o); break;
    case 3: attend_in_vectors(3, queries, first, range, m, l, o); break;
    case 4: attend_in_vectors(4, queries, first, range, m, l, o); break;
    default: attend_in_vectors(SOME, queries, first, range, m, l, o);
    }
}

#endif
