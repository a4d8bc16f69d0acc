/* Attention in integers, of up to sixteen queries, in matrix registers. */
#include "attention_int8.h"

#if defined(TIER_AMX) && KV_INTEGERS
#include "amx_tiles.h"

enum { TILE_BYTES = 16 * STEP };

/* Sixty-four positions of gathered values: [padded_dim / 16][plane][16][64]. */
static int gathered_step(int dim) { return dim / 16 * KV_BYTES * TILE_BYTES; }

int gathered_bytes(int dim) { return CHUNK / STEP * gathered_step(dim); }

int takes_many(const Queries *queries, int left)
{
    return left > FEW && queries->plan->padded_dim % STEP == 0;
}

/* Values of four blocks side by side, as a matrix register takes them. */
void gather_values(const Range *range, int dim)
{
    const int piece = TILE_BYTES / 4;
    for (int position = range->begin; position < range->end; position += BLOCK_SIZE) {
        const uint8_t *v = block_of(range, range->v, position);
        uint8_t *out = range->gathered + in_chunk(position) / STEP * gathered_step(dim);
        out += position % STEP / BLOCK_SIZE * piece;
        for (int i = 0; i < dim; i += 16)
            for (int plane = 0; plane < KV_BYTES; plane++, out += TILE_BYTES)
                memcpy(out, v + (plane * dim + i) * BLOCK_SIZE, (size_t)piece);
    }
}

/* Of sixteen queries with sixteen keys, or columns of values. */
typedef int32_t TileSums[3][16][16];

INLINE void multiply_tiles(
    const int8_t *x_high, const int8_t *x_low, int stride, const uint8_t *w, int64_t plane)
{
    _tile_loadd(4, x_high, stride);
    _tile_loadd(6, w, STEP);
    _tile_loadd(5, x_low, stride);
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 5, 6);
    if (KV_BITS == 16) {
        _tile_loadd(7, w + plane, STEP);
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
    _tile_stored(0, sums[0], STEP);
    _tile_stored(1, sums[1], STEP);
    if (KV_BITS == 16)
        _tile_stored(2, sums[2], STEP);
}

INLINE Sums sums_of(TileSums tile, int n)
{
    Sums sums = no_sums();
    memcpy(&sums.top, tile[0][n], 64);
    memcpy(&sums.middle, tile[1][n], 64);
    if (KV_BITS == 16)
        memcpy(&sums.other, tile[2][n], 64);
    return sums;
}

/* A block's products are made while those of the one before it become scores. */
static void score_many(const Scoring *scoring, const Range *range, const int dim)
{
    TileSums sums[2] __attribute__((aligned(64)));
    const Scoring s = *scoring; /* what is stored below is none of it */
    const int bytes = dim * BLOCK_SIZE * KV_BYTES;
    for (int position = range->begin; position < range->end + BLOCK_SIZE; position += BLOCK_SIZE) {
        int i = position / BLOCK_SIZE % 2, before = position - BLOCK_SIZE;
        if (position < range->end) {
            const uint8_t *k = block_of(range, range->k, position);
            clear_sums();
            for (int c = 0; c < dim; c += STEP)
                multiply_tiles(s.high + c, s.low + c, dim, k + c * BLOCK_SIZE, dim * BLOCK_SIZE);
            store_sums(sums[i]);
        }
        if (position + BLOCK_SIZE < range->end)
            for (int u = 0; u < bytes; u += 64)
                prefetch(block_of(range, range->k, position + BLOCK_SIZE) + u);
        if (before < range->begin)
            continue;
        f32v k_scales = load(range->scales[0] + in_chunk(before));
        int all = all_see(&s, before);
        for (int n = 0; n < s.N; n++) {
            Sums row = sums_of(sums[1 - i], n);
            put_scores(&s, n, before, all, k_scales, &row);
        }
    }
}

/* Sixteen columns' products are made while those of the ones before them are scaled. */
static void weigh_many(int N, const Range *range, int dim, const Shares *shares, float *o)
{
    TileSums sums[2] __attribute__((aligned(64)));
    const int first = in_chunk(range->begin) / STEP, end = in_chunk(range->end - 1) / STEP + 1;
    const int step_bytes = gathered_step(dim), columns_bytes = KV_BYTES * TILE_BYTES;
    for (int i = 0; i <= dim / 16; i++) {
        const uint8_t *values = range->gathered + i * columns_bytes;
        if (i < dim / 16) {
            clear_sums();
            for (int step = first; step < end; step++)
                multiply_tiles(shares->high[0] + step * STEP, shares->low[0] + step * STEP, CHUNK,
                               values + step * step_bytes, TILE_BYTES);
            store_sums(sums[i % 2]);
        }
        for (int n = 0; i > 0 && n < N; n++) {
            for (int step = first; step < end; step++)
                for (int u = 0; u < KV_BYTES; u++)
                    prefetch(values + columns_bytes + step * step_bytes + 64 * (KV_BYTES * n + u));
            Sums row = sums_of(sums[1 - i % 2], n);
            store(o + n * dim + 16 * (i - 1),
                  value_of(&row, shares->offsets[n]) * splat(shares->scales[n]));
        }
    }
}

void attend_many(
    int N, const Queries *queries, int first, const Range *range, float *m, float *l, float *o)
{
    const int dim = queries->plan->padded_dim;
    float scores[MOST_QUERIES][CHUNK] __attribute__((aligned(64)));
    Shares shares __attribute__((aligned(64)));
    Scoring scoring = scoring_of(queries, first, N, scores);
    use_matrix_registers(MOST_QUERIES);
    score_many(&scoring, range, dim);
    share_out(N, range, scores, m, l, &shares);
    __asm__ volatile("" ::: "memory"); /* loads of matrix registers name no memory to gcc */
    weigh_many(N, range, dim, &shares, o);
    _tile_release();
}

#endif
