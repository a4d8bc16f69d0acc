/* Attention of a few queries over one chunk of positions.  For each query, with s = scale (q . k):
 *     m = max(s);  l = sum of exp(s - m);  o = sum of exp(s - m) v
 *
 * Two implementations: float32 (attention_f32.c), and int8 planes where the tier has int8 dot
 * products (attention_planes.h). */
#ifndef ATTENTION_CHUNK_H
#define ATTENTION_CHUNK_H

#include "kv_cache.h"
#include "simd.h"

#define MASKED (-1e30f) /* below every real score: masked positions, and the maximum of none */

/* A score of 1 as an exponent of e; int8 attention has scores in units of ln 2. */
#define SCORE_UNIT (KV_INT8 ? 0x1.62e43p-1f : 1.0f)

enum { MAX_PASS_QUERIES = 16, MAX_DIM = 512 };

/* The queries of a span with one kv head, row by row; `group` heads a row. */
typedef struct {
    const Plan *plan;
    const Operation *operation;
    int count, group, first_row;
    void *q; /* as store_query lays them out */
} QueryTile;

/* Positions begin .. end - 1 of one sequence, layer and kv head, all within one chunk. */
typedef struct {
    const uint8_t *k, *v;
    const int32_t *block_table;
    int64_t block_bytes;
    int begin, end;
    const float *k_scales, *v_scales; /* [KV_CHUNK], by position in the chunk */
    uint8_t *repacked_v; /* as repack_values lays values out */
} KVRange;

/* Floats of memory for `count` queries, and for prepare_kv_range. */
int64_t query_tile_floats(int count, int padded_dim);
int64_t kv_range_floats(int padded_dim);

/* Stores x, [head_dim], as query i. */
void store_query(const QueryTile *queries, int i, const float *x);

/* Prepares, in `memory`, what all calls of attention_chunk for these queries share. */
void prepare_kv_range(const QueryTile *queries, float *memory, KVRange *range);

/* How many of the `left` remaining queries the next call of attention_chunk takes. */
int pass_size(const QueryTile *queries, int left);

/* For queries first .. first + N - 1: the largest score m [N], in units of SCORE_UNIT, l [N] = sum
 * of exp(score - m), and o [N][padded_dim] = sum of exp(score - m) v. */
void attention_chunk(
    const QueryTile *queries, int first, int N, const KVRange *range, float *m, float *l, float *o);

/* The last position that query i sees, and the first. */
static inline int last_visible(const QueryTile *queries, int i)
{
    return queries->plan->batch.positions[queries->first_row + i / queries->group];
}

static inline int first_visible(const QueryTile *queries, int i)
{
    int window = queries->operation->window;
    int first = window ? last_visible(queries, i) - window + 1 : 0;
    return first > 0 ? first : 0;
}

INLINE f32v softcap_scores(float cap, f32v s) { return splat(cap) * tanh_v(s / splat(cap)); }

/* The scores of a vector of positions, for a query that sees first .. last; other positions become
 * MASKED. */
INLINE f32v mask_scores(int first, int last, int position, f32v s)
{
    i32v positions = lane_numbers() + position;
    if (first <= position && position + LANES - 1 <= last)
        return s;
    return blend((positions >= first) & (positions <= last), s, splat(MASKED));
}

static inline int chunk_offset(int position) { return position & (KV_CHUNK - 1); }

/* The block of position `position`; `heads` is where block 0 has this layer and kv head. */
static inline const uint8_t *kv_block(const KVRange *range, const uint8_t *heads, int position)
{
    return heads + range->block_table[position / BLOCK_SIZE] * range->block_bytes;
}

#endif
