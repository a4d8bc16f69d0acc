/* Attention with int8 planes: what dot products of four bytes, for few queries (attention_dot4.c),
 * and AMX tiles, for many (attention_amx.c), have in common.
 *
 * Keys and values have 16 or 8 bits and a scale for each position.  Queries have 15 bits and one
 * scale.  A chunk's attention weights exp(score - m), times the scales of the values, also have 15
 * bits and one scale.  Integer sums are exact in any order, so a row has the same bits whether its
 * queries were few or many.
 *
 * x = 256 high + low, both signed; w = 256 high + low - 2^15, both unsigned, or high - 2^7 with 8
 * bits.  In units of 256 high bytes, and of the scales,
 *     x . w = 256 high_high + high_low + low_high - 128 sum(x) + sum(low of x) / 2
 *     high_high = sum(w's high, x's high), high_low = sum(w's high, x's low), low_high likewise
 * where products of two low bytes are computed as if all of w's low bytes were 127.5.  The error is
 * smaller than that of keys of 14 bits.  The last two terms are the zero-point compensation.
 * Scores are in units of ln 2, so that exp is 2^score. */
#ifndef ATTENTION_PLANES_H
#define ATTENTION_PLANES_H

#include "attention_chunk.h"

enum {
    LARGE_PASS = 8,      /* queries whose sums fit the vector registers */
    SMALL_PASS = 4,      /* with AMX, up to this many queries use dot4 */
    STEP_POSITIONS = 64, /* positions whose weights are computed at once: a row of an AMX tile */
};

static const float LOG2_E = 0x1.715476p+0f;

static inline int rounded_up(int count, int to) { return (count + to - 1) / to * to; }

/* ---- Sums */

typedef struct {
    i32v high_high, high_low, low_high; /* the last two are added together */
} DotSums;

INLINE DotSums zero_sums(void) { return (DotSums){splat_int(0), splat_int(0), splat_int(0)}; }

/* x . w, without the scales */
INLINE f32v combine_sums(const DotSums *sums, int32_t compensation)
{
    u32v value = ((u32v)sums->high_high << 8) + (u32v)sums->high_low
                 - (u32v)splat_int(compensation);
    return to_float((i32v)(KV_BITS == 16 ? value + (u32v)sums->low_high : value));
}

/* ---- Scores */

/* The arguments of a pass: queries first .. first + N - 1, and where their scores go. */
typedef struct {
    const int8_t *high, *low;
    const float *scales;
    const int32_t *compensation;
    int firsts[MAX_PASS_QUERIES], lasts[MAX_PASS_QUERIES]; /* positions they see */
    int N;
    float softcap;
    float (*scores)[KV_CHUNK];
} ScorePass;

ScorePass make_score_pass(const QueryTile *queries, int first, int N, float (*scores)[KV_CHUNK]);

/* True if all queries of the pass see all positions of the block at `position`. */
INLINE int is_unmasked_block(const ScorePass *pass, int position)
{
    return pass->firsts[pass->N - 1] <= position
           && position + BLOCK_SIZE - 1 <= pass->lasts[0];
}

/* Stores sixteen scores of query n. */
INLINE void store_scores(
    const ScorePass *pass,
    int n,
    int position,
    int is_unmasked,
    f32v k_scales,
    const DotSums *sums)
{
    f32v s = combine_sums(sums, pass->compensation[n]) * (k_scales * splat(pass->scales[n]));
    if (pass->softcap > 0)
        s = softcap_scores(pass->softcap, s) * splat(LOG2_E);
    if (!is_unmasked)
        s = mask_scores(pass->firsts[n], pass->lasts[n], position, s);
    store(pass->scores[n] + chunk_offset(position), s);
}

/* ---- Attention weights */

typedef struct {
    int8_t high[MAX_PASS_QUERIES][KV_CHUNK], low[MAX_PASS_QUERIES][KV_CHUNK];
    int32_t compensation[MAX_PASS_QUERIES];
    float scales[MAX_PASS_QUERIES];
} AttentionWeights;

/* Turns the scores of N queries into attention weights, m and l.  Three loops over the queries,
 * because the steps for a single query would wait for each other. */
void softmax_weights(int N,
                     const KVRange *range,
                     float (*scores)[KV_CHUNK],
                     float *m,
                     float *l,
                     AttentionWeights *weights);

/* ---- Few queries: dot products of four bytes */

/* As attention_chunk, for 1 to SMALL_PASS queries or LARGE_PASS. */
void attend_dot4(
    int N, const QueryTile *queries, int first, const KVRange *range, float *m, float *l, float *o);

/* ---- Many queries: AMX tiles */

/* As attention_chunk, for up to MAX_PASS_QUERIES. */
void attend_amx(
    int N, const QueryTile *queries, int first, const KVRange *range, float *m, float *l, float *o);

#ifdef TIER_AMX
/* True if `left` queries are enough for AMX. */
int uses_amx(const QueryTile *queries, int left);

/* Bytes of a chunk's repacked values, and the repacking itself. */
int repacked_v_bytes(int padded_dim);
void repack_values(const KVRange *range, int padded_dim);
#else
static inline int uses_amx(const QueryTile *queries, int left) { return (void)queries, 0 * left; }
static inline int repacked_v_bytes(int padded_dim) { return 0 * padded_dim; }
static inline void repack_values(const KVRange *range, int padded_dim)
{
    (void)range, (void)padded_dim;
}
#endif

#endif
