/* The structures of a plan: laid out by backend/cpu/layout.py and backend.py, which mirror them
 * (library.py), and run by plan.c.  T rows in the batch, R logit rows; every row of a buffer is
 * padded to a multiple of 16 floats. */
#ifndef PLAN_H
#define PLAN_H

#include <stdint.h>

/* Positions in a cache block, and in a chunk of attention. */
enum { BLOCK_SIZE = 16, KV_CHUNK = 256 };

enum Kind {
    COS_SIN, NORM, QUANTIZE, LINEAR, ROPE, ATTENTION, COMBINE, ACTIVATE, SELECT,
    SOFTCAP, POOL, ROUTE, EXPERTS, SUM_EXPERTS
};

/* The rows of a stacked weight that have one format.  Thread t owns groups
 * bounds[t] .. bounds[t + 1] - 1, which lie at groups[t] in ascending order. */
typedef struct {
    int32_t format, rows, columns, first_column; /* rows become columns first_column .. of out */
    const int32_t *bounds;
    const uint8_t *const *groups;
} WeightPart;

typedef struct {
    int32_t kind;
    int32_t logit_rows_only;
    int32_t width; /* LINEAR, QUANTIZE, EXPERTS: of x; others: of out */
    int32_t x_stride, out_stride;
    int32_t layer;
    int32_t accumulate;
    int32_t option; /* see below */
    int32_t window; /* ATTENTION: positions, 0: no window */
    int32_t num_parts; /* EXPERTS: of each expert */
    int32_t half_rotary_dim;
    int32_t norms_across_heads; /* ROPE: 1 if q_norm, + 2 if k_norm, spans all heads */
    int32_t one_row_tiles; /* QUANTIZE, ACTIVATE: each tile has one row */
    int32_t num_experts, num_chosen; /* ACTIVATE: num_chosen rows for each row; 0: one */
    int32_t max_choices;
    int32_t gated; /* LINEAR: groups are pairs of gate and up; 1: silu(gate) * up, 2: gelu */
    float eps, scale, softcap, magnitude;
    const float *x;
    float *out; /* null if only the tiles are wanted */
    int32_t *tiles; /* LINEAR, EXPERTS: read; others: written; may be null */
    const float *weight, *second_weight;
    float *cos_sin; /* [T][2][half_rotary_dim]: cos, then sin */
    const WeightPart *parts;
    int32_t *choices; /* laid out by experts.c */
} Operation;

/* `option` is true for: ROPE: pairs are interleaved; ACTIVATE: gelu; POOL: mean; ROUTE: weights of
 * the chosen experts add up to 1; EXPERTS: x has one row for all choices of a row. */

typedef struct {
    int32_t num_rows, num_logit_rows, num_sequences, max_blocks;
    const int32_t *positions, *sequences;
    const int64_t *slot_mapping;
    const int32_t *block_tables;
    const uint8_t *is_long;
    const int32_t *logit_rows;
} Batch;

/* Consecutive rows of one sequence whose queries go through k and v together. */
typedef struct {
    int32_t first, count;
} QuerySpan;

typedef struct ThreadPool ThreadPool;

typedef struct {
    /* Laid out once. */
    int32_t num_operations, num_layers, num_heads, num_kv_heads, head_dim, padded_dim;
    int32_t max_rows, max_split_rows, max_kv_chunks, num_threads;
    uint8_t *k_cache, *v_cache; /* [block][layer][kv head][head_bytes]: kv_cache.h */
    float *partials; /* [split row][head][chunk][2 + padded_dim] */
    float *scratch; /* [thread][scratch_floats] */
    int64_t scratch_floats;
    QuerySpan *query_spans; /* [max_rows] */
    uint64_t *heartbeat;
    const Operation *operations;
    ThreadPool *pool;

    /* Of the current step. */
    Batch batch;
    int32_t num_query_spans, num_kv_chunks, is_kv_split;
} Plan;

#endif
