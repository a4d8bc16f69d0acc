/* Attention of a few queries over one chunk of positions, in floats (attention_f32.c) or, where there
 * are products of bytes, in integers (attention_int8.h). */
#ifndef ATTENTION_CHUNK_H
#define ATTENTION_CHUNK_H

#include "kv_cache.h"
#include "simd.h"

#define NOTHING (-1e30f) /* below every score: of a masked position, and of no chunk */

/* What a score of 1 is of the exponent of e. */
#define SCORE_UNIT (KV_INTEGERS ? 0x1.62e43p-1f : 1.0f)

enum { MOST_QUERIES = 16, MAX_DIM = 512 };

/* The queries of a span with one kv head, row by row. */
typedef struct {
    const Plan *plan;
    const Operation *operation;
    int count, group, first_row;
    void *scaled; /* as put_query lays them out */
} Queries;

/* Positions begin .. end - 1 of one sequence, in one layer and kv head, and of one chunk. */
typedef struct {
    const uint8_t *k, *v;
    const int32_t *table;
    int64_t block_bytes;
    int begin, end;
    const float *scales[2]; /* of keys and of values, by position in the chunk */
    uint8_t *gathered;      /* values, as gather_values lays them out */
} Range;

/* Floats that so many queries take, and that share_range takes. */
int64_t queries_floats(int count, int padded_dim);
int64_t shared_floats(int padded_dim);

/* Makes x, [head_dim], query i. */
void put_query(const Queries *queries, int i, const float *x);

/* Makes in `memory` what the calls of attend_chunk for all these queries share. */
void share_range(const Queries *queries, float *memory, Range *range);

/* How many of the `left` queries that are left the next call of attend_chunk takes. */
int queries_taken(const Queries *queries, int left);

/* Of queries first .. first + N - 1 the largest score m, in units of SCORE_UNIT, l = sum of
 * exp(score - m), and o = sum of exp(score - m) v, [N][padded_dim]. */
void attend_chunk(
    const Queries *queries, int first, int N, const Range *range, float *m, float *l, float *o);

/* The last position that query i sees, and the first one. */
static inline int last_of(const Queries *queries, int i)
{
    return queries->plan->batch.positions[queries->first_row + i / queries->group];
}

static inline int first_of(const Queries *queries, int i)
{
    int window = queries->operation->window;
    int first = window ? last_of(queries, i) - window + 1 : 0;
    return first > 0 ? first : 0;
}

INLINE f32v capped(float cap, f32v s) { return splat(cap) * tanh_v(s / splat(cap)); }

/* Scores of a vector of positions with a query that sees first .. last; NOTHING for others. */
INLINE f32v visible(int first, int last, int position, f32v s)
{
    i32v positions = lanes() + position;
    if (first <= position && position + LANES - 1 <= last)
        return s;
    return choose((positions >= first) & (positions <= last), s, splat(NOTHING));
}

static inline int in_chunk(int position) { return position & (CHUNK - 1); }

/* The block of position `position`, from `heads` on. */
static inline const uint8_t *block_of(const Range *range, const uint8_t *heads, int position)
{
    return heads + range->table[position / BLOCK_SIZE] * range->block_bytes;
}

#endif
