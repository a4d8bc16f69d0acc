/* Causal attention over the paged KV cache, with sliding windows and soft caps.
 *
 * Positions are taken in chunks of 256, aligned to position 0: in each the largest score m, the sum
 * l of exp(score - m), and the sum o of exp(score - m) v.  Chunks are joined in ascending order:
 *     M' = max(M, m);  L' = L exp(M - M') + l exp(m - M');  O' likewise;  out = O / L
 * (Milakov & Gimelshein 2018, algorithm 3, by chunks).  What a row computes depends on its position
 * alone, so that its bits are the same in any batch and chunking of the prompt; who computes which
 * chunk is free.  A thread takes whole rows, some of one sequence at a time, which share k and v; where
 * that would give the threads uneven work, they share the chunks, which COMBINE joins.
 *
 * Several queries of one kv head go through k and v together: what is loaded serves all
 * (attention_chunk.h). */
#include "attention.h"
#include "attention_chunk.h"

/* So many units for each thread come out even enough, though some are much longer than others. */
enum { SPAN_QUERIES = 64, EVEN_UNITS = 16 };

static int group_of(const Plan *plan) { return plan->num_heads / plan->num_kv_heads; }

static int span_rows(int group) { return group < SPAN_QUERIES ? SPAN_QUERIES / group : 1; }

/* A thread's: queries; the state of each, [2 + padded_dim]: M, L, O; what share_range makes. */
int64_t attention_scratch(int num_heads, int num_kv_heads, int padded_dim)
{
    int group = num_heads / num_kv_heads, count = span_rows(group) * group;
    return queries_floats(count, padded_dim) + (int64_t)count * (2 + padded_dim)
           + shared_floats(padded_dim);
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
    int is_uneven = plan->num_spans * plan->num_kv_heads < EVEN_UNITS * plan->num_threads;
    int fits = batch->num_rows <= plan->max_split_rows;
    plan->is_split = is_uneven && fits && plan->num_chunks > 1;
}

int attention_units(const Plan *plan)
{
    return plan->num_spans * plan->num_kv_heads * (plan->is_split ? plan->num_chunks : 1);
}

/* Joins a chunk's m, l, o to the state M, L, O of what lies before it. */
static void join(float *state, float m, float l, const float *o, int dim)
{
    if (m == NOTHING)
        return;
    float both = m > state[0] ? m : state[0];
    f32v old = exp_v(splat((state[0] - both) * SCORE_UNIT));
    f32v new = exp_v(splat((m - both) * SCORE_UNIT));
    state[1] = state[1] * old[0] + l * new[0];
    state[0] = both;
    for (int i = 0; i < dim; i += LANES)
        store(state + 2 + i, load(state + 2 + i) * old + load(o + i) * new);
}

static void forget(float *state, int dim)
{
    memset(state, 0, sizeof(float) * (size_t)(2 + dim));
    state[0] = NOTHING;
}

static void write_out(const Plan *plan, const float *state, float *out)
{
    f32v inverse = splat(1 / state[1]);
    for (int i = 0; i < plan->head_dim; i += LANES)
        store_first(out + i, load(state + 2 + i) * inverse, plan->head_dim - i);
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

/* A span's rows in the heads of one kv head. */
static Queries take_queries(
    const Plan *plan, const Operation *operation, Span span, int kv_head, float *scratch)
{
    int group = group_of(plan);
    Queries queries = {plan, operation, span.count * group, group, span.first, scratch};
    for (int i = 0; i < queries.count; i++) {
        const float *x = operation->x + (int64_t)(span.first + i / group) * operation->x_stride;
        put_query(&queries, i, x + (kv_head * group + i % group) * plan->head_dim);
    }
    return queries;
}

/* What queries first .. first + N - 1 see of a range: rows of a sequence ascend, so that the first
 * begins first and the last one ends last. */
static Range seen(const Queries *queries, int first, int N, const Range *range)
{
    Range part = *range;
    int begin = first_of(queries, first) / BLOCK_SIZE * BLOCK_SIZE;
    int end = last_of(queries, first + N - 1) + 1;
    if (part.begin < begin)
        part.begin = begin;
    if (part.end > end)
        part.end = end;
    return part;
}

/* One chunk for all queries, joined to their states; queries that end before it, or begin behind it,
 * take no part. */
static void attend(const Queries *queries, const Range *range, float *states)
{
    int dim = queries->plan->padded_dim, i = 0;
    float m[MOST_QUERIES], l[MOST_QUERIES];
    float o[MOST_QUERIES * MAX_DIM] __attribute__((aligned(64)));
    while (i < queries->count && last_of(queries, i) < range->begin)
        i++;
    for (int N; i < queries->count; i += N) {
        N = queries_taken(queries, queries->count - i);
        Range part = seen(queries, i, N, range);
        if (part.begin >= part.end)
            break;
        attend_chunk(queries, i, N, &part, m, l, o);
        for (int n = 0; n < N; n++)
            join(states + (i + n) * (2 + dim), m[n], l[n], o + n * dim, dim);
    }
}

/* Chunks first .. end - 1 for a span of rows and one kv head. */
static void attend_chunks(
    const Queries *queries, int kv_head, int first, int end, float *states, float *shared)
{
    const Plan *plan = queries->plan;
    const Batch *batch = &plan->batch;
    int64_t head_bytes = kv_head_bytes(plan->padded_dim), heads = plan->num_kv_heads;
    int64_t at = (queries->operation->layer * heads + kv_head) * head_bytes;
    int sequence = batch->sequences[queries->first_row];
    Range range = {plan->k_cache + at, plan->v_cache + at,
                   batch->block_tables + (int64_t)sequence * batch->max_blocks,
                   plan->num_layers * heads * head_bytes, 0, 0, {0, 0}, 0};
    for (int i = 0; i < queries->count; i++)
        forget(states + (int64_t)i * (2 + plan->padded_dim), plan->padded_dim);
    for (int chunk = first; chunk < end; chunk++) {
        range.begin = chunk * CHUNK;
        range.end = range.begin + CHUNK;
        Range all = seen(queries, 0, queries->count, &range);
        share_range(queries, shared, &all);
        attend(queries, &all, states);
    }
}

static void run_unit(const Plan *plan, const Operation *operation, int unit, int thread)
{
    int chunks = plan->is_split ? plan->num_chunks : 1, dim = plan->padded_dim;
    /* Heads of the same positions, which lie side by side, follow each other. */
    int kv_head = unit % plan->num_kv_heads, chunk = unit / plan->num_kv_heads % chunks;
    Span span = plan->spans[unit / plan->num_kv_heads / chunks];
    int end = plan->batch.positions[span.first + span.count - 1] / CHUNK + 1;
    if (plan->is_split && chunk >= end)
        return;
    float *scratch = plan->scratch + thread * plan->scratch_floats;
    Queries queries = take_queries(plan, operation, span, kv_head, scratch);
    float *states = scratch + queries_floats(queries.count, dim);
    float *shared = states + (int64_t)queries.count * (2 + dim);
    int first = plan->is_split ? chunk : first_of(&queries, 0) / CHUNK;
    attend_chunks(&queries, kv_head, first, plan->is_split ? chunk + 1 : end, states, shared);
    for (int i = 0; i < queries.count; i++) {
        const float *state = states + i * (2 + dim);
        int group = group_of(plan), row = span.first + i / group, head = kv_head * group + i % group;
        if (plan->is_split)
            memcpy(partial_of(plan, row, head, chunk), state, sizeof(float) * (size_t)(2 + dim));
        else
            write_out(plan, state, out_of(operation, plan, row, head));
    }
}

void attention_run(const Plan *plan, const Operation *operation, int first, int end, int thread)
{
    for (int unit = first; unit < end; unit++)
        run_unit(plan, operation, unit, thread);
}

void combine_run(const Plan *plan, const Operation *operation, int first, int end)
{
    float state[2 + MAX_DIM] __attribute__((aligned(64)));
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
