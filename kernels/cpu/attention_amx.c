/* Attention with int8 planes, for up to sixteen queries, in AMX tiles. */
#include "attention_planes.h"

#if defined(TIER_AMX) && KV_INT8
#include "amx_tiles.h"

enum { TILE_BYTES = 16 * STEP_POSITIONS };

/* Bytes of 64 positions of repacked values: [padded_dim / 16][plane][16][64]. */
static int repacked_step(int dim) { return dim / 16 * KV_BYTES * TILE_BYTES; }

int repacked_v_bytes(int dim) { return KV_CHUNK / STEP_POSITIONS * repacked_step(dim); }

int uses_amx(const QueryTile *queries, int left)
{
    return left > SMALL_PASS && queries->plan->padded_dim % STEP_POSITIONS == 0;
}

/* Puts the values of four blocks side by side, as an AMX tile takes them. */
void repack_values(const KVRange *range, int dim)
{
    const int piece = TILE_BYTES / 4;
    for (int position = range->begin; position < range->end; position += BLOCK_SIZE) {
        const uint8_t *v = kv_block(range, range->v, position);
        uint8_t *out = range->repacked_v
                       + chunk_offset(position) / STEP_POSITIONS * repacked_step(dim);
        out += position % STEP_POSITIONS / BLOCK_SIZE * piece;
        for (int i = 0; i < dim; i += 16)
            for (int plane = 0; plane < KV_BYTES; plane++, out += TILE_BYTES)
                memcpy(out, v + (plane * dim + i) * BLOCK_SIZE, (size_t)piece);
    }
}

/* The sums of sixteen queries with sixteen keys, or sixteen columns of values. */
typedef int32_t TileSums[3][16][16];

INLINE void dot_tiles(
    const int8_t *x_high, const int8_t *x_low, int stride, const uint8_t *w, int64_t plane)
{
    _tile_loadd(4, x_high, stride);
    _tile_loadd(6, w, STEP_POSITIONS);
    _tile_loadd(5, x_low, stride);
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 5, 6);
    if (KV_BITS == 16) {
        _tile_loadd(7, w + plane, STEP_POSITIONS);
        _tile_dpbsud(2, 4, 7);
    }
}

INLINE void clear_sums(void)
{
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
}

INLINE void store_sums(TileSums sums)
{
    _tile_stored(0, sums[0], STEP_POSITIONS);
    _tile_stored(1, sums[1], STEP_POSITIONS);
    if (KV_BITS == 16)
        _tile_stored(2, sums[2], STEP_POSITIONS);
}

INLINE DotSums load_sums(TileSums tile, int n)
{
    DotSums sums = zero_sums();
    memcpy(&sums.high_high, tile[0][n], 64);
    memcpy(&sums.high_low, tile[1][n], 64);
    if (KV_BITS == 16)
        memcpy(&sums.low_high, tile[2][n], 64);
    return sums;
}

/* Multiplies one block while it converts the sums of the previous block to scores. */
static void scores_amx(const ScorePass *pass, const KVRange *range, const int dim)
{
    TileSums sums[2] __attribute__((aligned(64)));
    const ScorePass s = *pass; /* a copy: the stores below cannot alias it */
    const int bytes = dim * BLOCK_SIZE * KV_BYTES;
    for (int position = range->begin; position < range->end + BLOCK_SIZE; position += BLOCK_SIZE) {
        int i = position / BLOCK_SIZE % 2, before = position - BLOCK_SIZE;
        if (position < range->end) {
            const uint8_t *k = kv_block(range, range->k, position);
            clear_sums();
            for (int c = 0; c < dim; c += STEP_POSITIONS)
                dot_tiles(s.high + c, s.low + c, dim, k + c * BLOCK_SIZE, dim * BLOCK_SIZE);
            store_sums(sums[i]);
        }
        if (position + BLOCK_SIZE < range->end)
            for (int u = 0; u < bytes; u += 64)
                prefetch(kv_block(range, range->k, position + BLOCK_SIZE) + u);
        if (before < range->begin)
            continue;
        f32v k_scales = load(range->k_scales + chunk_offset(before));
        int all = is_unmasked_block(&s, before);
        for (int n = 0; n < s.N; n++) {
            DotSums row = load_sums(sums[1 - i], n);
            store_scores(&s, n, before, all, k_scales, &row);
        }
    }
}

/* Multiplies sixteen columns while it scales the sums of the previous sixteen. */
static void weighted_values_amx(
    int N, const KVRange *range, int dim, const AttentionWeights *weights, float *o)
{
    TileSums sums[2] __attribute__((aligned(64)));
    const int first = chunk_offset(range->begin) / STEP_POSITIONS,
              end = chunk_offset(range->end - 1) / STEP_POSITIONS + 1;
    const int step_bytes = repacked_step(dim), columns_bytes = KV_BYTES * TILE_BYTES;
    for (int i = 0; i <= dim / 16; i++) {
        const uint8_t *values = range->repacked_v + i * columns_bytes;
        if (i < dim / 16) {
            clear_sums();
            for (int step = first; step < end; step++)
                dot_tiles(weights->high[0] + step * STEP_POSITIONS,
                          weights->low[0] + step * STEP_POSITIONS, KV_CHUNK,
                          values + step * step_bytes, TILE_BYTES);
            store_sums(sums[i % 2]);
        }
        for (int n = 0; i > 0 && n < N; n++) {
            for (int step = first; step < end; step++)
                for (int u = 0; u < KV_BYTES; u++)
                    prefetch(values + columns_bytes + step * step_bytes + 64 * (KV_BYTES * n + u));
            DotSums row = load_sums(sums[1 - i % 2], n);
            store(o + n * dim + 16 * (i - 1),
                  combine_sums(&row, weights->compensation[n]) * splat(weights->scales[n]));
        }
    }
}

void attend_amx(
    int N, const QueryTile *queries, int first, const KVRange *range, float *m, float *l, float *o)
{
    const int dim = queries->plan->padded_dim;
    float scores[MAX_PASS_QUERIES][KV_CHUNK] __attribute__((aligned(64)));
    AttentionWeights weights __attribute__((aligned(64)));
    ScorePass pass = make_score_pass(queries, first, N, scores);
    configure_amx_tiles(MAX_PASS_QUERIES);
    scores_amx(&pass, range, dim);
    softmax_weights(N, range, scores, m, l, &weights);
    __asm__ volatile("" ::: "memory"); /* tile loads name no memory to gcc */
    weighted_values_amx(N, range, dim, &weights, o);
    _tile_release();
}

#endif
