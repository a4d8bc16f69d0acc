/* Causal attention over the paged KV cache, with sliding windows and soft caps.
 *
 * Positions are taken in chunks of 256, aligned to position 0: in each the largest score m, the sum
 * l of exp(score - m), and the sum o of exp(score - m) v.  Chunks are joined in ascending order:
 *     M' = max(M, m);  L' = L exp(M - M') + l exp(m - M');  O' likewise;  out = O / L
 * (Milakov & Gimelshein 2018, algorithm 3, by chunks).  What a row computes depends on its position
 * alone, so that its bits are the same in any batch and chunking of the prompt; who computes which
 * chunk is free.  With few rows the chunks are shared among the threads and joined by COMBINE; with
 * many a thread takes whole rows, some of one sequence at a time, which share k and v.
 *
 * A dozen queries of one kv head go through k and v together: each vector loaded serves all. */
#include "attention.h"
#include "simd.h"

#ifdef TIER_AVX512
enum { QUERIES = 12, SOME = 8, FEW = 4, SPAN_QUERIES = 60 };
#else
enum { QUERIES = 4, SOME = 4, FEW = 4, SPAN_QUERIES = 60 };
#endif

#define NOTHING (-1e30f) /* below every score: of a masked position, and of no chunk */

/* The queries of a span with one kv head, row by row, and what they have found. */
typedef struct {
    int count, group, first_row, kv_head;
    float *q;     /* [count][padded_dim], scaled */
    float *state; /* [count][2 + padded_dim]: M, L, O */
} Queries;

static int group_of(const Plan *plan) { return plan->num_heads / plan->num_kv_heads; }

static int span_rows(int group) { return group < SPAN_QUERIES ? SPAN_QUERIES / group : 1; }

int64_t attention_scratch(int num_heads, int num_kv_heads, int padded_dim)
{
    int group = num_heads / num_kv_heads;
    return (int64_t)span_rows(group) * group * (2 * padded_dim + 2);
}

void attention_prepare(Plan *plan)
{
    const Batch *batch = &plan->batch;
    int limit = span_rows(group_of(plan));
    plan->num_spans = plan->num_chunks = 0;
    for (int row = 0; row < batch->num_rows; row++) {
        Span *span = &plan->spans[plan->num_spans - 1];
        int continues = row > 0 && batch->sequences[row] == batch->sequences[row - 1];
        if (continues && span->count < limit)
            span->count++;
        else
            plan->spans[plan->num_spans++] = (Span){row, 1};
        int chunks = batch->positions[row] / CHUNK + 1;
        if (chunks > plan->num_chunks)
            plan->num_chunks = chunks;
    }
    plan->is_split = batch->num_rows <= plan->max_split_rows && plan->num_chunks > 1;
}

int attention_units(const Plan *plan)
{
    return plan->num_spans * plan->num_kv_heads * (plan->is_split ? plan->num_chunks : 1);
}

static int last_of(const Plan *plan, const Queries *queries, int i)
{
    return plan->batch.positions[queries->first_row + i / queries->group];
}

static int first_of(const Plan *plan, const Operation *operation, const Queries *queries, int i)
{
    int first = operation->window ? last_of(plan, queries, i) - operation->window + 1 : 0;
    return first > 0 ? first : 0;
}

/* Sixteen values of a cache from number `i` on, without their scales. */
INLINE f32x16 load_kv(const uint8_t *values, int i)
{
    const uint8_t *at = values + i * KV_BYTES;
    return KV_BITS == 8    ? load_signed_bytes(at)
           : KV_BITS == 16 ? load_half((const uint16_t *)at)
                           : load((const float *)at);
}

/* The scales of the sixteen positions of a block. */
INLINE f32x16 kv_scales(const uint8_t *values, int dim)
{
    return KV_BITS == 8 ? load((const float *)(values + dim * BLOCK_SIZE)) : splat(1);
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
            s[n] *= kv_scales(k, dim);
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

/* Positions begin .. end of one sequence in one layer and kv head. */
typedef struct {
    const uint8_t *k, *v;
    const int32_t *table;
    int64_t block_bytes;
    int dim, begin, end;
} Range;

INLINE void weigh(const int N, const int S, const Range *range, const float *p, int at, float *o)
{
    f32x16 sums[QUERIES][4];
    UNROLL for (int n = 0; n < N; n++) UNROLL for (int i = 0; i < S; i++) sums[n][i] = splat(0);
    for (int position = range->begin; position < range->end; position += BLOCK_SIZE) {
        const uint8_t *v = range->v + range->table[position / BLOCK_SIZE] * range->block_bytes;
        int left = range->end - position, count = left < BLOCK_SIZE ? left : BLOCK_SIZE;
        weigh_block(N, S, p + position % CHUNK, count, v + at * KV_BYTES, range->dim, sums);
    }
    UNROLL for (int n = 0; n < N; n++) UNROLL for (int i = 0; i < S; i++)
        store(o + n * range->dim + at + 16 * i, sums[n][i]);
}

/* m, l [N] and o [N][dim] of N queries over one chunk. */
INLINE void attend_chunk(
    const int N,
    const Plan *plan,
    const Operation *operation,
    const Queries *queries,
    int first_query,
    Range range,
    float *m,
    float *l,
    float *o)
{
    float p[QUERIES * CHUNK] __attribute__((aligned(64)));
    int first[QUERIES], last[QUERIES];
    f32x16 largest[QUERIES];
    for (int n = 0; n < N; n++) {
        first[n] = first_of(plan, operation, queries, first_query + n);
        last[n] = last_of(plan, queries, first_query + n);
        largest[n] = splat(NOTHING);
    }
    /* Rows of a sequence ascend: the first query begins first, the last one ends last. */
    if (range.end > last[N - 1] + 1)
        range.end = last[N - 1] + 1;
    if (range.begin < first[0])
        range.begin = first[0] / BLOCK_SIZE * BLOCK_SIZE;
    for (int position = range.begin; position < range.end; position += BLOCK_SIZE) {
        f32x16 s[QUERIES];
        const int32_t *block = range.table + position / BLOCK_SIZE;
        int64_t at = *block * range.block_bytes, is_last = position + BLOCK_SIZE >= range.end;
        const uint8_t *next = range.k + block[!is_last] * range.block_bytes;
        scores_of_block(
            N, queries->q + first_query * range.dim, range.dim, range.k + at, range.v + at, next, s);
        i32x16 positions = lanes() + position;
        UNROLL for (int n = 0; n < N; n++) {
            if (operation->cap > 0)
                s[n] = splat(operation->cap) * tanh16(s[n] / splat(operation->cap));
            s[n] = choose((positions >= first[n]) & (positions <= last[n]), s[n], splat(NOTHING));
            largest[n] = max16(largest[n], s[n]);
            store(p + n * CHUNK + position % CHUNK, s[n]);
        }
    }
    for (int n = 0; n < N; n++) {
        f32x16 sum = splat(0);
        m[n] = largest16(largest[n]);
        for (int position = range.begin; position < range.end; position += BLOCK_SIZE) {
            float *at = p + n * CHUNK + position % CHUNK;
            f32x16 s = load(at), e = exp16(s - splat(m[n]));
            e = choose(s == splat(NOTHING), splat(0), e);
            sum += e;
            if (KV_BITS == 8)
                e *= kv_scales(range.v + range.table[position / BLOCK_SIZE] * range.block_bytes,
                               range.dim);
            store(at, e);
        }
        l[n] = sum16(sum);
    }
    int at = 0, S = N > FEW ? 2 : 4; /* so that the sums fit the registers */
    for (; at + 16 * S <= range.dim; at += 16 * S)
        weigh(N, S, &range, p, at, o);
    for (; at < range.dim; at += 16)
        weigh(N, 1, &range, p, at, o);
}

/* Joins a chunk's m, l, o to the state M, L, O of what lies before it. */
static void join(float *state, float m, float l, const float *o, int dim)
{
    if (m == NOTHING)
        return;
    float both = m > state[0] ? m : state[0];
    f32x16 old = exp16(splat(state[0] - both)), new = exp16(splat(m - both));
    state[1] = state[1] * old[0] + l * new[0];
    state[0] = both;
    for (int i = 0; i < dim; i += 16)
        store(state + 2 + i, load(state + 2 + i) * old + load(o + i) * new);
}

static void forget(float *state, int dim)
{
    memset(state, 0, sizeof(float) * (size_t)(2 + dim));
    state[0] = NOTHING;
}

static void write_out(const Plan *plan, const float *state, float *out)
{
    f32x16 inverse = splat(1 / state[1]);
    for (int i = 0; i < plan->head_dim; i += 16) {
        int left = plan->head_dim - i;
        store_first(out + i, load(state + 2 + i) * inverse, left < 16 ? left : 16);
    }
}

static float *out_of(const Operation *operation, const Plan *plan, int row, int head)
{
    return operation->out + (int64_t)row * operation->out_stride + head * plan->head_dim;
}

static float *partial_of(const Plan *plan, int row, int head, int chunk)
{
    int64_t index = ((int64_t)row * plan->num_heads + head) * plan->max_chunks + chunk;
    return plan->partials + index * (2 + plan->padded_dim);
}

/* The scaled queries of a span's rows in the heads of one kv head. */
static Queries take_queries(
    const Plan *plan, const Operation *operation, Span span, int kv_head, int thread)
{
    int group = group_of(plan), dim = plan->padded_dim;
    float *scratch = plan->scratch + thread * plan->scratch_floats;
    Queries queries = {span.count * group, group, span.first, kv_head, scratch,
                       scratch + (int64_t)span.count * group * dim};
    for (int i = 0; i < queries.count; i++) {
        const float *x = operation->x + (int64_t)(span.first + i / group) * operation->x_stride;
        float *q = queries.q + i * dim;
        x += (kv_head * group + i % group) * plan->head_dim;
        memset(q, 0, sizeof(float) * (size_t)dim);
        for (int j = 0; j < plan->head_dim; j++)
            q[j] = x[j] * operation->scale;
        forget(queries.state + i * (2 + dim), dim);
    }
    return queries;
}

/* One chunk for all queries, joined to their states; queries that end before it take no part. */
static void attend(
    const Plan *plan, const Operation *operation, const Queries *queries, Range range)
{
    int dim = plan->padded_dim, i = 0;
    float m[QUERIES], l[QUERIES], o[QUERIES * 512] __attribute__((aligned(64)));
    while (i < queries->count && last_of(plan, queries, i) < range.begin)
        i++;
    for (int N; i < queries->count; i += N) {
        int left = queries->count - i;
        N = left >= QUERIES ? QUERIES : left >= SOME ? SOME : left < FEW ? left : FEW;
        switch (N) {
        case 1: attend_chunk(1, plan, operation, queries, i, range, m, l, o); break;
        case 2: attend_chunk(2, plan, operation, queries, i, range, m, l, o); break;
        case 3: attend_chunk(3, plan, operation, queries, i, range, m, l, o); break;
        case 4: attend_chunk(4, plan, operation, queries, i, range, m, l, o); break;
#ifdef TIER_AVX512
        case 8: attend_chunk(8, plan, operation, queries, i, range, m, l, o); break;
#endif
        default: attend_chunk(QUERIES, plan, operation, queries, i, range, m, l, o);
        }
        for (int n = 0; n < N; n++)
            join(queries->state + (i + n) * (2 + dim), m[n], l[n], o + n * dim, dim);
    }
}

void attention_run(const Plan *plan, const Operation *operation, int unit, int thread)
{
    int chunks = plan->is_split ? plan->num_chunks : 1, dim = plan->padded_dim;
    int chunk = unit % chunks, kv_head = unit / chunks % plan->num_kv_heads;
    Span span = plan->spans[unit / chunks / plan->num_kv_heads];
    const Batch *batch = &plan->batch;
    int last_chunk = batch->positions[span.first + span.count - 1] / CHUNK;
    if (plan->is_split && chunk > last_chunk)
        return;
    Queries queries = take_queries(plan, operation, span, kv_head, thread);
    int first_chunk = plan->is_split ? chunk : first_of(plan, operation, &queries, 0) / CHUNK;
    if (plan->is_split)
        last_chunk = chunk;
    int64_t head_bytes = kv_head_bytes(dim), heads = plan->num_kv_heads;
    int64_t at = (operation->layer * heads + kv_head) * head_bytes;
    Range range = {plan->k_cache + at, plan->v_cache + at,
                   batch->block_tables + (int64_t)batch->sequences[span.first] * batch->max_blocks,
                   plan->num_layers * heads * head_bytes, dim, 0, 0};
    for (int c = first_chunk; c <= last_chunk; c++) {
        range.begin = c * CHUNK;
        range.end = range.begin + CHUNK;
        attend(plan, operation, &queries, range);
    }
    for (int i = 0; i < queries.count; i++) {
        const float *state = queries.state + i * (2 + dim);
        int row = span.first + i / queries.group, head = kv_head * queries.group + i % queries.group;
        if (plan->is_split)
            memcpy(partial_of(plan, row, head, chunk), state, sizeof(float) * (size_t)(2 + dim));
        else
            write_out(plan, state, out_of(operation, plan, row, head));
    }
}

void combine_run(const Plan *plan, const Operation *operation, int first, int end)
{
    float state[2 + 512] __attribute__((aligned(64)));
    for (int row = first; row < end; row++) {
        int last_chunk = plan->batch.positions[row] / CHUNK;
        for (int head = 0; head < plan->num_heads; head++) {
            forget(state, plan->padded_dim);
            for (int c = 0; c <= last_chunk; c++) {
                const float *partial = partial_of(plan, row, head, c);
                join(state, partial[0], partial[1], partial + 2, plan->padded_dim);
            }
            write_out(plan, state, out_of(operation, plan, row, head));
        }
    }
}
