/* Attention in float32.  The cache holds halves, floats, or int8 with a scale for each position. */
#include "attention_chunk.h"

#if !KV_INT8

/* The numbers of queries that go through a chunk together, and CHAINS, the partial sums of each
 * score that hide the latency of fma.  The order of a score's sums must not depend on the number of
 * queries. */
#ifdef TIER_AVX512
enum { LARGE_PASS = 12, MEDIUM_PASS = 8, SMALL_PASS = 4, CHAINS = 2 };
#elif defined(TIER_AVX2)
enum { LARGE_PASS = 6, MEDIUM_PASS = 6, SMALL_PASS = 3, CHAINS = 1 };
#else
enum { LARGE_PASS = 4, MEDIUM_PASS = 4, SMALL_PASS = 2, CHAINS = 1 };
#endif

int64_t query_tile_floats(int count, int padded_dim) { return (int64_t)count * padded_dim; }
int64_t kv_range_floats(int padded_dim) { return 0 * padded_dim; }

void prepare_kv_range(const QueryTile *queries, float *memory, KVRange *range)
{
    (void)queries, (void)memory, (void)range;
}

int pass_size(const QueryTile *queries, int left)
{
    (void)queries;
    return left >= LARGE_PASS    ? LARGE_PASS
           : left >= MEDIUM_PASS ? MEDIUM_PASS
           : left < SMALL_PASS   ? left
                                 : SMALL_PASS;
}

void store_query(const QueryTile *queries, int i, const float *x)
{
    const Plan *plan = queries->plan;
    float *q = (float *)queries->q + (int64_t)i * plan->padded_dim;
    memset(q, 0, sizeof(float) * (size_t)plan->padded_dim);
    for (int j = 0; j < plan->head_dim; j++)
        q[j] = x[j] * queries->operation->scale;
}

/* A vector of the cache's elements from number `i` on, not yet multiplied by their scales. */
INLINE f32v load_kv(const uint8_t *values, int i)
{
    const uint8_t *at = values + i * KV_BYTES;
    return KV_BITS == 8    ? load_i8(at)
           : KV_BITS == 16 ? load_f16((const uint16_t *)at)
                           : load((const float *)at);
}

/* s = q . k for the positions of one block.  Also prefetches this block's v and the next block's k,
 * since blocks are scattered in memory. */
INLINE void block_scores(
    const int N,
    const float *q,
    int dim,
    const uint8_t *k,
    const uint8_t *v,
    const uint8_t *next,
    f32v (*s)[VECTORS])
{
    f32v sums[CHAINS][LARGE_PASS][VECTORS];
    UNROLL for (int c = 0; c < CHAINS; c++) UNROLL for (int n = 0; n < N; n++)
        UNROLL for (int p = 0; p < VECTORS; p++) sums[c][n][p] = splat(0);
    for (int i = 0; i < dim; i += 2) {
        prefetch(v + 16 * KV_BYTES * i);
        prefetch(next + 16 * KV_BYTES * i);
        UNROLL for (int c = 0; c < 2; c++) {
            f32v x[VECTORS];
            UNROLL for (int p = 0; p < VECTORS; p++) x[p] = load_kv(k, 16 * (i + c) + LANES * p);
            UNROLL for (int n = 0; n < N; n++) UNROLL for (int p = 0; p < VECTORS; p++) {
                f32v *sum = &sums[c % CHAINS][n][p];
                *sum = fma_v(x[p], splat(q[n * dim + i + c]), *sum);
            }
        }
    }
    UNROLL for (int n = 0; n < N; n++) UNROLL for (int p = 0; p < VECTORS; p++) {
        s[n][p] = CHAINS == 2 ? sums[0][n][p] + sums[CHAINS - 1][n][p] : sums[0][n][p];
        if (KV_BITS == 8)
            s[n][p] *= load(kv_scales(k, dim) + LANES * p);
    }
}

/* o[n][0 .. S - 1] += sum of p[n] v over the positions of one block, in S vectors. */
INLINE void add_weighted_values(
    const int N, const int S, const float *p, int count, const uint8_t *v, int dim, f32v (*o)[4])
{
    for (int u = 0; u < count; u++, v += dim * KV_BYTES) {
        f32v x[4];
        UNROLL for (int i = 0; i < S; i++) x[i] = load_kv(v, LANES * i);
        UNROLL for (int n = 0; n < N; n++) UNROLL for (int i = 0; i < S; i++)
            o[n][i] = fma_v(x[i], splat(p[n * KV_CHUNK + u]), o[n][i]);
    }
}

INLINE void weighted_values(
    const int N, const int S, const KVRange *range, int dim, const float *p, int at, float *o)
{
    f32v sums[LARGE_PASS][4];
    UNROLL for (int n = 0; n < N; n++) UNROLL for (int i = 0; i < S; i++) sums[n][i] = splat(0);
    for (int position = range->begin; position < range->end; position += BLOCK_SIZE) {
        const uint8_t *v = kv_block(range, range->v, position);
        int left = range->end - position, count = left < BLOCK_SIZE ? left : BLOCK_SIZE;
        add_weighted_values(N, S, p + chunk_offset(position), count, v + at * KV_BYTES, dim, sums);
    }
    UNROLL for (int n = 0; n < N; n++) UNROLL for (int i = 0; i < S; i++)
        store(o + n * dim + at + LANES * i, sums[n][i]);
}

/* m, l [N] and o [N][dim] of N queries over one chunk. */
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
    const float *q = (const float *)queries->q + (int64_t)first * dim;
    float p[LARGE_PASS * KV_CHUNK] __attribute__((aligned(64)));
    f32v largest[LARGE_PASS];
    int firsts[LARGE_PASS], lasts[LARGE_PASS];
    for (int n = 0; n < N; n++) {
        largest[n] = splat(MASKED);
        firsts[n] = first_visible(queries, first + n);
        lasts[n] = last_visible(queries, first + n);
    }
    for (int position = range->begin; position < range->end; position += BLOCK_SIZE) {
        f32v s[LARGE_PASS][VECTORS];
        int next = position + BLOCK_SIZE < range->end ? position + BLOCK_SIZE : position;
        block_scores(N, q, dim, kv_block(range, range->k, position),
                        kv_block(range, range->v, position), kv_block(range, range->k, next), s);
        UNROLL for (int n = 0; n < N; n++) UNROLL for (int part = 0; part < VECTORS; part++) {
            int first_lane = position + LANES * part;
            f32v score = s[n][part];
            if (queries->operation->softcap > 0)
                score = softcap_scores(queries->operation->softcap, score);
            score = mask_scores(firsts[n], lasts[n], first_lane, score);
            largest[n] = max_v(largest[n], score);
            store(p + n * KV_CHUNK + chunk_offset(first_lane), score);
        }
    }
    for (int n = 0; n < N; n++) {
        f32v sum = splat(0);
        m[n] = reduce_max(largest[n]);
        for (int position = range->begin; position < range->end; position += BLOCK_SIZE)
            for (int lane = 0; lane < BLOCK_SIZE; lane += LANES) {
                float *at = p + n * KV_CHUNK + chunk_offset(position) + lane;
                f32v s = load(at);
                f32v e = blend(s == splat(MASKED), splat(0), exp_v(s - splat(m[n])));
                sum += e;
                if (KV_BITS == 8)
                    e *= load(kv_scales(kv_block(range, range->v, position), dim) + lane);
                store(at, e);
            }
        l[n] = reduce_add(sum);
    }
    int at = 0, S = N > SMALL_PASS ? 2 : 4; /* vectors of o; the sums fit the registers */
    for (; at + LANES * S <= dim; at += LANES * S)
        weighted_values(N, S, range, dim, p, at, o);
    for (; at < dim; at += LANES)
        weighted_values(N, 1, range, dim, p, at, o);
}

void attention_chunk(
    const QueryTile *queries, int first, int N, const KVRange *range, float *m, float *l, float *o)
{
    switch (N) {
    case 1: attend_pass(1, queries, first, range, m, l, o); break;
    case 2: attend_pass(2, queries, first, range, m, l, o); break;
    case 3: attend_pass(3, queries, first, range, m, l, o); break;
#ifdef TIER_AVX512
    case 4: attend_pass(4, queries, first, range, m, l, o); break;
    case 8: attend_pass(8, queries, first, range, m, l, o); break;
#endif
    default: attend_pass(LARGE_PASS, queries, first, range, m, l, o);
    }
}

#endif
