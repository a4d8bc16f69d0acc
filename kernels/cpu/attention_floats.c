/* Attention in floats: keys and values as halves, floats, or bytes with scales. */
#include "attention_chunk.h"

#if !KV_INTEGERS

#ifdef TIER_AVX512
enum { QUERIES = 12, SOME = 8, FEW = 4 };
#else
enum { QUERIES = 4, SOME = 4, FEW = 4 };
#endif

int64_t queries_floats(int count, int padded_dim) { return (int64_t)count * padded_dim; }
int64_t shared_floats(int padded_dim) { return 0 * padded_dim; }

void share_range(const Queries *queries, float *memory, Range *range)
{
    (void)queries, (void)memory, (void)range;
}

int queries_taken(const Queries *queries, int left)
{
    (void)queries;
    return left >= QUERIES ? QUERIES : left >= SOME ? SOME : left < FEW ? left : FEW;
}

void put_query(const Queries *queries, int i, const float *x)
{
    const Plan *plan = queries->plan;
    float *q = (float *)queries->scaled + (int64_t)i * plan->padded_dim;
    memset(q, 0, sizeof(float) * (size_t)plan->padded_dim);
    for (int j = 0; j < plan->head_dim; j++)
        q[j] = x[j] * queries->operation->scale;
}

/* Sixteen values of a cache from number `i` on, without their scales. */
INLINE f32x16 load_kv(const uint8_t *values, int i)
{
    const uint8_t *at = values + i * KV_BYTES;
    return KV_BITS == 8    ? load_signed_bytes(at)
           : KV_BITS == 16 ? load_half((const uint16_t *)at)
                           : load((const float *)at);
}

/* Meanwhile the v of this block and the k of the next one are fetched: blocks lie scattered. */
INLINE void scores_of_block(
    const int N,
    const float *q,
    int dim,
    const uint8_t *k,
    const uint8_t *v,
    const uint8_t *next,
    f32x16 *s)
{
    f32x16 odd[QUERIES];
    UNROLL for (int n = 0; n < N; n++) s[n] = odd[n] = splat(0);
    for (int i = 0; i < dim; i += 2) {
        prefetch(v + 16 * KV_BYTES * i);
        prefetch(next + 16 * KV_BYTES * i);
        f32x16 a = load_kv(k, 16 * i), b = load_kv(k, 16 * (i + 1));
        UNROLL for (int n = 0; n < N; n++) {
            s[n] = fma16(a, splat(q[n * dim + i]), s[n]);
            odd[n] = fma16(b, splat(q[n * dim + i + 1]), odd[n]);
        }
    }
    UNROLL for (int n = 0; n < N; n++) {
        s[n] += odd[n];
        if (KV_BITS == 8)
            s[n] *= load(kv_scales(k, dim));
    }
}

/* o[n][0 .. 16 S) += sum of p[n] v over the positions of one block. */
INLINE void weigh_block(
    const int N, const int S, const float *p, int count, const uint8_t *v, int dim, f32x16 (*o)[4])
{
    for (int u = 0; u < count; u++, v += dim * KV_BYTES) {
        f32x16 x[4];
        UNROLL for (int i = 0; i < S; i++) x[i] = load_kv(v, 16 * i);
        UNROLL for (int n = 0; n < N; n++) UNROLL for (int i = 0; i < S; i++)
            o[n][i] = fma16(x[i], splat(p[n * CHUNK + u]), o[n][i]);
    }
}

INLINE void weigh(
    const int N, const int S, const Range *range, int dim, const float *p, int at, float *o)
{
    f32x16 sums[QUERIES][4];
    UNROLL for (int n = 0; n < N; n++) UNROLL for (int i = 0; i < S; i++) sums[n][i] = splat(0);
    for (int position = range->begin; position < range->end; position += BLOCK_SIZE) {
        const uint8_t *v = block_of(range, range->v, position);
        int left = range->end - position, count = left < BLOCK_SIZE ? left : BLOCK_SIZE;
        weigh_block(N, S, p + in_chunk(position), count, v + at * KV_BYTES, dim, sums);
    }
    UNROLL for (int n = 0; n < N; n++) UNROLL for (int i = 0; i < S; i++)
        store(o + n * dim + at + 16 * i, sums[n][i]);
}

/* m, l [N] and o [N][dim] of N queries over one chunk. */
INLINE void attend(
    const int N, const Queries *queries, int first, const Range *range, float *m, float *l, float *o)
{
    const int dim = queries->plan->padded_dim;
    const float *q = (const float *)queries->scaled + (int64_t)first * dim;
    float p[QUERIES * CHUNK] __attribute__((aligned(64)));
    f32x16 largest[QUERIES];
    int firsts[QUERIES], lasts[QUERIES];
    for (int n = 0; n < N; n++) {
        largest[n] = splat(NOTHING);
        firsts[n] = first_of(queries, first + n);
        lasts[n] = last_of(queries, first + n);
    }
    for (int position = range->begin; position < range->end; position += BLOCK_SIZE) {
        f32x16 s[QUERIES];
        int next = position + BLOCK_SIZE < range->end ? position + BLOCK_SIZE : position;
        scores_of_block(N, q, dim, block_of(range, range->k, position),
                        block_of(range, range->v, position), block_of(range, range->k, next), s);
        UNROLL for (int n = 0; n < N; n++) {
            if (queries->operation->cap > 0)
                s[n] = capped(queries->operation->cap, s[n]);
            s[n] = visible(firsts[n], lasts[n], position, s[n]);
            largest[n] = max16(largest[n], s[n]);
            store(p + n * CHUNK + in_chunk(position), s[n]);
        }
    }
    for (int n = 0; n < N; n++) {
        f32x16 sum = splat(0);
        m[n] = largest16(largest[n]);
        for (int position = range->begin; position < range->end; position += BLOCK_SIZE) {
            float *at = p + n * CHUNK + in_chunk(position);
            f32x16 s = load(at);
            f32x16 e = choose(s == splat(NOTHING), splat(0), exp16(s - splat(m[n])));
            sum += e;
            if (KV_BITS == 8)
                e *= load(kv_scales(block_of(range, range->v, position), dim));
            store(at, e);
        }
        l[n] = sum16(sum);
    }
    int at = 0, S = N > FEW ? 2 : 4; /* so that the sums fit the registers */
    for (; at + 16 * S <= dim; at += 16 * S)
        weigh(N, S, range, dim, p, at, o);
    for (; at < dim; at += 16)
        weigh(N, 1, range, dim, p, at, o);
}

void attend_chunk(
    const Queries *queries, int first, int N, const Range *range, float *m, float *l, float *o)
{
    switch (N) {
    case 1: attend(1, queries, first, range, m, l, o); break;
    case 2: attend(2, queries, first, range, m, l, o); break;
    case 3: attend(3, queries, first, range, m, l, o); break;
    case 4: attend(4, queries, first, range, m, l, o); break;
#ifdef TIER_AVX512
    case 8: attend(8, queries, first, range, m, l, o); break;
#endif
    default: attend(QUERIES, queries, first, range, m, l, o);
    }
}

#endif
