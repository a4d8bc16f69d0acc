/* Attention of a few queries over one chunk of positions, in floats (attention_f32.c) or, where there
 * are products of bytes, in integers (attention_int8.h). */
#ifndef ATTENTION_CHUNK_H
#define ATTENTION_CHUNK_H

#include "kv_cache.h"
#include "simd.h"

#define MASKED (-1e30f) /* below every score: of a masked position, and of no chunk */

/* What a score of 1 is of the exponent of e. */
#define SCORE_UNIT (KV_INT8 ? 0x1.62e43p-1f : 1.0f)

enum { MAX_PASS_QUERIES = 16, MAX_DIM = 512 };

/* The queries of a span with one kv head, row by row. */
typedef struct {
    const Plan *plan;
    const Operation *operation;
    int count, group, first_row;
    void *scaled; /* as store_query lays them out */
} QueryTile;

/* Positions begin .. end - 1 of one sequence, in one layer and kv head, and of one chunk. */
typedef struct {
    const uint8_t *k, *v;
    const int32_t *table;
    int64_t block_bytes;
    int begin, end;
    const float *scales[2]; /* of keys and of values, by position in the chunk */
    uint8_t *repacked_v;      /* values, as repack_values lays them out */
} KVRange;

/* Floats that so many queries take, and that prepare_kv_range takes. */
int64_t query_tile_floats(int count, int padded_dim);
int64_t kv_range_floats(int padded_dim);

/* Makes x, [head_dim], query i. */
void store_query(const QueryTile *queries, int i, const float *x);

/* Makes in `memory` what the calls of attention_chunk for all these queries share. */
void prepare_kv_range(const QueryTile *queries, float *memory, KVRange *range);

/* How many of the `left` queries that are left the next call of attention_chunk takes. */
int pass_size(const QueryTile *queries, int left);

/* Of queries first .. first + N - 1 the largest score m, in units of SCORE_UNIT, l = sum of
 * exp(score - m), and o = sum of exp(score - m) v, [N][padded_dim]. */
void attention_chunk(
    const QueryTile *queries, int first, int N, const KVRange *range, float *m, float *l, float *o);

/* The last position that query i sees, and the first one. */
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

/* Scores of a vector of positions with a query that sees first .. last; MASKED for others. */
INLINE f32v mask_scores(int first, int last, int position, f32v s)
{
    i32v positions = lane_numbers() + position;
    if (first <= position && position + LANES - 1 <= last)
        return s;
    return blend((positions >= first) & (positions <= last), s, splat(MASKED));
}

static inline int chunk_offset(int position) { return position & (KV_CHUNK - 1); }

/* The block of position `position`, from `heads` on. */
static inline const uint8_t *kv_block(const KVRange *range, const uint8_t *heads, int position)
{
    return heads + range->table[position / BLOCK_SIZE] * range->block_bytes;
}

#endif
