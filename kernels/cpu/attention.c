/* Causal attention over the paged KV cache, with sliding windows and soft caps.
 *
 * Positions are processed in chunks of 256, aligned to position 0.  Each chunk yields the largest
 * score m, the sum l of exp(score - m), and the sum o of exp(score - m) v.  Chunks are merged in
 * ascending order:
 *     M' = max(M, m);  L' = L exp(M - M') + l exp(m - M');  O' likewise;  out = O / L
 * (Milakov & Gimelshein 2018, algorithm 3, by chunks; flash-decoding's split KV).  What a row
 * computes depends only on its position, so its bits are the same in any batch and however its
 * prompt was cut.  Any thread may compute any chunk.  Normally a thread takes whole rows, several
 * of one sequence at a time, because they share k and v.  If that would give the threads uneven
 * work, they share out the chunks, and COMBINE merges the results.
 *
 * Several queries of one kv head go through k and v together, so that each load serves all of them
 * (attention_chunk.h). */
#include "attention.h"
#include "attention_chunk.h"

/* SPAN_QUERIES: queries of a span and kv head, at most.  MIN_UNITS_PER_THREAD: with this many units
 * each, threads finish at about the same time, although some units are much longer than others. */
enum { SPAN_QUERIES = 64, MIN_UNITS_PER_THREAD = 16 };

static int heads_per_kv_head(const Plan *plan) { return plan->num_heads / plan->num_kv_heads; }

static int max_span_rows(int group) { return group < SPAN_QUERIES ? SPAN_QUERIES / group : 1; }

/* One thread's scratch: the queries; the state of each, [2 + padded_dim]: M, L, O; the memory of
 * prepare_kv_range. */
int64_t attention_scratch(int num_heads, int num_kv_heads, int padded_dim)
{
    int group = num_heads / num_kv_heads, count = max_span_rows(group) * group;
    return query_tile_floats(count, padded_dim) + (int64_t)count * (2 + padded_dim)
           + kv_range_floats(padded_dim);
}

void attention_prepare(Plan *plan)
{
    const Batch *batch = &plan->batch;
    int limit = max_span_rows(heads_per_kv_head(plan));
    plan->num_query_spans = plan->num_kv_chunks = 0;
    for (int row = 0; row < batch->num_rows; row++) {
        QuerySpan *span = &plan->query_spans[plan->num_query_spans - 1];
        int continues = row > 0 && batch->sequences[row] == batch->sequences[row - 1];
        if (continues && span->count < limit)
            span->count++;
        else
            plan->query_spans[plan->num_query_spans++] = (QuerySpan){row, 1};
        int chunks = batch->positions[row] / KV_CHUNK + 1;
        if (chunks > plan->num_kv_chunks)
            plan->num_kv_chunks = chunks;
    }
    int is_uneven = plan->num_query_spans * plan->num_kv_heads
                    < MIN_UNITS_PER_THREAD * plan->num_threads;
    int fits = batch->num_rows <= plan->max_split_rows;
    plan->is_kv_split = is_uneven && fits && plan->num_kv_chunks > 1;
}

int attention_units(const Plan *plan)
{
    return plan->num_query_spans * plan->num_kv_heads
           * (plan->is_kv_split ? plan->num_kv_chunks : 1);
}

/* Merges a chunk's m, l, o into the state M, L, O of the chunks before it. */
static void merge_state(float *state, float m, float l, const float *o, int dim)
{
    if (m == MASKED)
        return;
    float both = m > state[0] ? m : state[0];
    f32v old = exp_v(splat((state[0] - both) * SCORE_UNIT));
    f32v new = exp_v(splat((m - both) * SCORE_UNIT));
    state[1] = state[1] * old[0] + l * new[0];
    state[0] = both;
    for (int i = 0; i < dim; i += LANES)
        store(state + 2 + i, load(state + 2 + i) * old + load(o + i) * new);
}

static void clear_state(float *state, int dim)
{
    memset(state, 0, sizeof(float) * (size_t)(2 + dim));
    state[0] = MASKED;
}

static void write_output(const Plan *plan, const float *state, float *out)
{
    f32v inverse = splat(1 / state[1]);
    for (int i = 0; i < plan->head_dim; i += LANES)
        store_partial(out + i, load(state + 2 + i) * inverse, plan->head_dim - i);
}

static float *output_at(const Operation *operation, const Plan *plan, int row, int head)
{
    return operation->out + (int64_t)row * operation->out_stride + head * plan->head_dim;
}

static float *partial_at(const Plan *plan, int row, int head, int chunk)
{
    int64_t index = ((int64_t)row * plan->num_heads + head) * plan->max_kv_chunks + chunk;
    return plan->partials + index * (2 + plan->padded_dim);
}

/* The queries of a span's rows, for the heads that share one kv head. */
static QueryTile load_query_tile(
    const Plan *plan, const Operation *operation, QuerySpan span, int kv_head, float *scratch)
{
    int group = heads_per_kv_head(plan);
    QueryTile tile = {plan, operation, span.count * group, group, span.first, scratch};
    for (int i = 0; i < tile.count; i++) {
        const float *x = operation->x + (int64_t)(span.first + i / group) * operation->x_stride;
        store_query(&tile, i, x + (kv_head * group + i % group) * plan->head_dim);
    }
    return tile;
}

/* The part of a range that queries first .. first + N - 1 see.  Rows of a sequence ascend, so the
 * first query's part starts first and the last query's part ends last. */
static KVRange visible_range(const QueryTile *tile, int first, int N, const KVRange *range)
{
    KVRange part = *range;
    int begin = first_visible(tile, first) / BLOCK_SIZE * BLOCK_SIZE;
    int end = last_visible(tile, first + N - 1) + 1;
    if (part.begin < begin)
        part.begin = begin;
    if (part.end > end)
        part.end = end;
    return part;
}

/* Processes one chunk for all queries and merges it into their states.  Skips queries that end
 * before the chunk or whose window starts after it. */
static void attend_passes(const QueryTile *tile, const KVRange *range, float *states)
{
    int dim = tile->plan->padded_dim, i = 0;
    float m[MAX_PASS_QUERIES], l[MAX_PASS_QUERIES];
    float o[MAX_PASS_QUERIES * MAX_DIM] __attribute__((aligned(64)));
    while (i < tile->count && last_visible(tile, i) < range->begin)
        i++;
    for (int N; i < tile->count; i += N) {
        N = pass_size(tile, tile->count - i);
        KVRange part = visible_range(tile, i, N, range);
        if (part.begin >= part.end)
            break;
        attention_chunk(tile, i, N, &part, m, l, o);
        for (int n = 0; n < N; n++)
            merge_state(states + (i + n) * (2 + dim), m[n], l[n], o + n * dim, dim);
    }
}

/* Processes chunks first .. end - 1 for a span of rows and one kv head. */
static void attend_kv_chunks(
    const QueryTile *tile, int kv_head, int first, int end, float *states, float *range_memory)
{
    const Plan *plan = tile->plan;
    const Batch *batch = &plan->batch;
    int64_t head_bytes = kv_head_bytes(plan->padded_dim), heads = plan->num_kv_heads;
    int64_t at = (tile->operation->layer * heads + kv_head) * head_bytes;
    int sequence = batch->sequences[tile->first_row];
    KVRange range = {
        .k = plan->k_cache + at,
        .v = plan->v_cache + at,
        .block_table = batch->block_tables + (int64_t)sequence * batch->max_blocks,
        .block_bytes = plan->num_layers * heads * head_bytes,
    };
    for (int i = 0; i < tile->count; i++)
        clear_state(states + (int64_t)i * (2 + plan->padded_dim), plan->padded_dim);
    for (int chunk = first; chunk < end; chunk++) {
        range.begin = chunk * KV_CHUNK;
        range.end = range.begin + KV_CHUNK;
        KVRange all = visible_range(tile, 0, tile->count, &range);
        prepare_kv_range(tile, range_memory, &all);
        attend_passes(tile, &all, states);
    }
}

static void run_unit(const Plan *plan, const Operation *operation, int unit, int thread)
{
    int chunks = plan->is_kv_split ? plan->num_kv_chunks : 1, dim = plan->padded_dim;
    /* Consecutive units are kv heads of the same positions, which lie side by side in memory. */
    int kv_head = unit % plan->num_kv_heads, chunk = unit / plan->num_kv_heads % chunks;
    QuerySpan span = plan->query_spans[unit / plan->num_kv_heads / chunks];
    int end = plan->batch.positions[span.first + span.count - 1] / KV_CHUNK + 1;
    if (plan->is_kv_split && chunk >= end)
        return;
    float *scratch = plan->scratch + thread * plan->scratch_floats;
    QueryTile tile = load_query_tile(plan, operation, span, kv_head, scratch);
    float *states = scratch + query_tile_floats(tile.count, dim);
    float *range_memory = states + (int64_t)tile.count * (2 + dim);
    int first = plan->is_kv_split ? chunk : first_visible(&tile, 0) / KV_CHUNK;
    attend_kv_chunks(&tile, kv_head, first, plan->is_kv_split ? chunk + 1 : end, states,
                     range_memory);
    for (int i = 0; i < tile.count; i++) {
        const float *state = states + i * (2 + dim);
        int row = span.first + i / tile.group, head = kv_head * tile.group + i % tile.group;
        if (plan->is_kv_split)
            memcpy(partial_at(plan, row, head, chunk), state, sizeof(float) * (size_t)(2 + dim));
        else
            write_output(plan, state, output_at(operation, plan, row, head));
    }
}

void run_attention(const Plan *plan, const Operation *operation, int first, int end, int thread)
{
    for (int unit = first; unit < end; unit++)
        run_unit(plan, operation, unit, thread);
}

void run_combine(const Plan *plan, const Operation *operation, int first, int end)
{
    float state[2 + MAX_DIM] __attribute__((aligned(64)));
    for (int row = first; row < end; row++) {
        int last_chunk = plan->batch.positions[row] / KV_CHUNK;
        for (int head = 0; head < plan->num_heads; head++) {
            clear_state(state, plan->padded_dim);
            for (int c = 0; c <= last_chunk; c++) {
                const float *partial = partial_at(plan, row, head, c);
                merge_state(state, partial[0], partial[1], partial + 2, plan->padded_dim);
            }
            write_output(plan, state, output_at(operation, plan, row, head));
        }
    }
}
