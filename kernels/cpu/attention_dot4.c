/* Attention with int8 planes, for up to eight queries, by int8 dot products of four. */
#include "attention_planes.h"

#if KV_INT8

enum { WORD_BYTES = 4 /* bytes that one dot product sums */ };

INLINE i32v broadcast_word(const int8_t *bytes)
{
    int32_t word;
    memcpy(&word, bytes, sizeof word);
    return splat_int(word);
}

/* ---- Scores */

INLINE void add_dots(DotSums *sums, u32v high, u32v low, i32v x_high, i32v x_low)
{
    sums->high_high = dot4(sums->high_high, high, x_high);
    sums->high_low = dot4(sums->high_low, high, x_low);
    if (KV_BITS == 16)
        sums->low_high = dot4(sums->low_high, low, x_high);
}

/* The scores of N queries.  Also prefetches this block's values and the next block's keys,
 * because blocks are scattered; line by line, because the CPU's own prefetcher handles
 * consecutive lines. */
INLINE void scores_dot4(const int N, const ScorePass *pass, const KVRange *range, int dim)
{
    const int plane = dim * BLOCK_SIZE;
    for (int position = range->begin; position < range->end; position += BLOCK_SIZE) {
        int next = position + BLOCK_SIZE < range->end ? position + BLOCK_SIZE : position;
        const uint8_t *high = kv_block(range, range->k, position);
        const uint8_t *values = kv_block(range, range->v, position);
        const uint8_t *keys = kv_block(range, range->k, next);
        DotSums sums[LARGE_PASS];
        UNROLL for (int n = 0; n < N; n++) sums[n] = zero_sums();
        for (int i = 0; i < dim; i += WORD_BYTES, high += 64) {
            UNROLL for (int u = 0; u < KV_BYTES; u++, values += 64, keys += 64) {
                prefetch(values);
                prefetch(keys);
            }
            u32v low = KV_BITS == 16 ? load_bytes(high + plane) : (u32v){0};
            UNROLL for (int n = 0; n < N; n++) add_dots(
                &sums[n], load_bytes(high), low, broadcast_word(pass->high + n * dim + i),
                broadcast_word(pass->low + n * dim + i));
        }
        f32v k_scales = load(range->k_scales + chunk_offset(position));
        int all = is_unmasked_block(pass, position);
        UNROLL for (int n = 0; n < N; n++) store_scores(pass, n, position, all, k_scales, &sums[n]);
    }
}

/* ---- Weighted sums of values */

INLINE void weighted_values_dot4(
    const int N, const KVRange *range, int dim, const AttentionWeights *weights, float *o)
{
    const int plane = dim * BLOCK_SIZE;
    for (int i = 0; i < dim; i += 16) {
        DotSums sums[LARGE_PASS];
        UNROLL for (int n = 0; n < N; n++) sums[n] = zero_sums();
        for (int position = range->begin; position < range->end; position += BLOCK_SIZE) {
            const uint8_t *v = kv_block(range, range->v, position) + i * BLOCK_SIZE;
            for (int u = 0; u < BLOCK_SIZE; u += WORD_BYTES, v += 64) {
                int at = chunk_offset(position + u);
                u32v low = KV_BITS == 16 ? load_bytes(v + plane) : (u32v){0};
                UNROLL for (int n = 0; n < N; n++) add_dots(
                    &sums[n], load_bytes(v), low, broadcast_word(weights->high[n] + at),
                    broadcast_word(weights->low[n] + at));
            }
        }
        UNROLL for (int n = 0; n < N; n++)
            store(o + n * dim + i,
                  combine_sums(&sums[n], weights->compensation[n]) * splat(weights->scales[n]));
    }
}

INLINE void attend_pass(
    const int N,
    const QueryTile *queries,
    int first,
    const KVRange *range,
    float *m,
    float *l,
    float *o)
{
    const int dim = queries->plan->padded_dim;
    float scores[LARGE_PASS][KV_CHUNK] __attribute__((aligned(64)));
    AttentionWeights weights __attribute__((aligned(64)));
    ScorePass pass = make_score_pass(queries, first, N, scores);
    scores_dot4(N, &pass, range, dim);
    softmax_weights(N, range, scores, m, l, &weights);
    weighted_values_dot4(N, range, dim, &weights, o);
}

void attend_dot4(
    int N, const QueryTile *queries, int first, const KVRange *range, float *m, float *l, float *o)
{
    switch (N) {
    case 1: attend_pass(1, queries, first, range, m, l, o); break;
    case 2: attend_pass(2, queries, first, range, m, l, o); break;
    case 3: attend_pass(3, queries, first, range, m, l, o); break;
    case 4: attend_pass(4, queries, first, range, m, l, o); break;
    default: attend_pass(LARGE_PASS, queries, first, range, m, l, o);
    }
}

#endif
