/* Attention in integers, as products of bytes take them: what vectors, for few queries
 * (attention_dot4.c), and matrix registers, for many (attention_amx.c), have in common.
 *
 * Keys and values have 16 or 8 bits and a scale for each position, queries 15 bits and one scale, and
 * the shares exp(score - m) of a chunk, times the scales of the values, 15 bits and one scale.  What
 * integers sum up to does not depend on who sums them or how, so that the bits of a row are the same
 * in vectors, for few queries, and in matrix registers, for many.
 *
 * x = 256 high + low, both signed; w = 256 high + low - 2^15, both unsigned, or high - 2^7.  In units of
 * 256 high bytes, and of the scales,
 *     x . w = 256 top + middle - 128 sum(x) + sum(low of x) / 2
 *     top = sum(high high), middle = sum(high low) + sum(low high)
 * where the products of two low bytes are taken as if w's were all 127.5, which is off by less than
 * keys of 14 bits would be.  Scores are in units of ln 2, so that exp is 2^score. */
#ifndef ATTENTION_INT8_H
#define ATTENTION_INT8_H

#include "attention_chunk.h"

enum {
    SOME = 8,  /* queries whose sums fit the vector registers */
    FEW = 4,   /* queries that vectors take, where there are matrix registers */
    STEP = 64, /* positions whose shares are made at once; bytes of a row of a matrix register */
};

static const float LOG2_E = 0x1.715476p+0f;

static inline int rounded_up(int count, int to) { return (count + to - 1) / to * to; }

/* ---- Sums */

typedef struct {
    i32v top, middle, other; /* `other` is another part of the middle */
} Sums;

INLINE Sums no_sums(void) { return (Sums){splat_int(0), splat_int(0), splat_int(0)}; }

/* x . w */
INLINE f32v value_of(const Sums *sums, int32_t offset)
{
    u32v value = ((u32v)sums->top << 8) + (u32v)sums->middle - (u32v)splat_int(offset);
    return to_float((i32v)(KV_BITS == 16 ? value + (u32v)sums->other : value));
}

/* ---- Scores */

/* Queries first .. first + N - 1, and where their scores go. */
typedef struct {
    const int8_t *high, *low;
    const float *scales;
    const int32_t *offsets;
    int firsts[MOST_QUERIES], lasts[MOST_QUERIES]; /* ascending */
    int N;
    float cap;
    float (*scores)[CHUNK];
} Scoring;

Scoring scoring_of(const Queries *queries, int first, int N, float (*scores)[CHUNK]);

INLINE int all_see(const Scoring *scoring, int position)
{
    return scoring->firsts[scoring->N - 1] <= position
           && position + BLOCK_SIZE - 1 <= scoring->lasts[0];
}

/* Sixteen scores of query n. */
INLINE void put_scores(
    const Scoring *scoring, int n, int position, int all_see, f32v k_scales, const Sums *sums)
{
    f32v s = value_of(sums, scoring->offsets[n]) * (k_scales * splat(scoring->scales[n]));
    if (scoring->cap > 0)
        s = capped(scoring->cap, s) * splat(LOG2_E);
    if (!all_see)
        s = visible(scoring->firsts[n], scoring->lasts[n], position, s);
    store(scoring->scores[n] + in_chunk(position), s);
}

/* ---- Shares */

typedef struct {
    int8_t high[MOST_QUERIES][CHUNK], low[MOST_QUERIES][CHUNK];
    int32_t offsets[MOST_QUERIES];
    float scales[MOST_QUERIES];
} Shares;

/* Scores of N queries to shares, m and l; in three loops, for what one query needs of itself takes
 * longer to come than what others do. */
void share_out(
    int N, const Range *range, float (*scores)[CHUNK], float *m, float *l, Shares *shares);

/* ---- Few queries, in vectors */

/* As attend_chunk, of 1 to 4 queries or SOME. */
void attend_dot4(
    int N, const Queries *queries, int first, const Range *range, float *m, float *l, float *o);

/* ---- Many queries, in matrix registers */

/* As attend_chunk, of at most MOST_QUERIES. */
void attend_many(
    int N, const Queries *queries, int first, const Range *range, float *m, float *l, float *o);

#ifdef TIER_AMX
/* Whether `left` queries are many. */
int takes_many(const Queries *queries, int left);

/* Bytes of a chunk's gathered values, and these themselves. */
int gathered_bytes(int padded_dim);
void gather_values(const Range *range, int padded_dim);
#else
static inline int takes_many(const Queries *queries, int left) { return (void)queries, 0 * left; }
static inline int gathered_bytes(int padded_dim) { return 0 * padded_dim; }
static inline void gather_values(const Range *range, int padded_dim) { (void)range, (void)padded_dim; }
#endif

#endif
