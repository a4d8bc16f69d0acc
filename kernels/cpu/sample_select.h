/* Candidates of a vocabulary: keeps the largest logits, or the smallest keys. */
#ifndef SAMPLE_SELECT_H
#define SAMPLE_SELECT_H

#include "simd.h"

/* Arrays over the vocabulary are padded to whole strides, with ids that are never kept. */
enum { STRIDE = 64 };

typedef struct {
    int32_t size; /* padded vocabulary */
    float *adjusted, *maxima; /* maxima: of each stride */
    int64_t *sums;            /* of the weights of each stride */

    /* The candidates: ids in ascending order, and what is known of each. */
    int32_t count, *ids;
    float *x;
    uint32_t *keys; /* the smallest are kept */
    int64_t *weights;
} Scratch;

/* A row to sample from; x of an id is (logit - best) / temperature. */
typedef struct {
    const float *logits;
    int32_t vocab_size;
    float best, temperature; /* best: the largest logit */
} LogitRow;

int64_t scratch_bytes(int32_t vocab_size);
Scratch scratch_at(uint8_t *memory, int32_t vocab_size);

/* A vector of logits; lanes beyond `left` become -infinity. */
INLINE f32v load_padded(const float *p, int32_t left)
{
    f32v x = splat(-INFINITY);
    if (left >= LANES)
        return load(p);
    memcpy(&x, p, sizeof(float) * (size_t)(left > 0 ? left : 0));
    return x;
}

/* x of a vector of ids from i on.  Dividing by 1 would change nothing but take time. */
INLINE f32v scaled_logits(const LogitRow *row, int32_t i)
{
    f32v x = load_padded(row->logits + i, row->vocab_size - i) - splat(row->best);
    return row->temperature == 1 ? x : x / splat(row->temperature);
}

/* Fills `maxima`, and returns the largest; NaN if any logit is NaN or the largest is infinite. */
float max_logit(const Scratch *s, const float *logits, int32_t vocab_size);

/* The lowest id with the largest logit. */
int32_t argmax(const Scratch *s, const LogitRow *row);

/* A lower bound of the k largest logits: the k-th largest of the maxima. */
float kth_largest_bound(const Scratch *s, int32_t k);

/* Makes candidates of the ids from `first` to `end`, whole strides, whose x is at least `least`. */
void gather_candidates(Scratch *s, const LogitRow *row, int32_t first, int32_t end, float least);

/* Keeps the k largest x, the first among equals. */
void keep_top_k(Scratch *s, int32_t k);

/* Keeps the smallest keys until their amounts (1 each if null) reach the goal, the first among
 * equals. */
void keep_smallest(Scratch *s, const int64_t *amounts, int64_t goal);

/* Keys of floats ascend as the floats descend; 0 and -0 have equal keys. */
INLINE uint32_t key_of(float value)
{
    uint32_t bits;
    value += 0.0f;
    memcpy(&bits, &value, sizeof bits);
    return bits >> 31 ? bits : ~bits & 0x7fffffff;
}

/* Keeps the first `count` candidates.  Weights after the last become 0, up to a whole vector. */
INLINE void truncate_candidates(Scratch *s, int32_t count)
{
    s->count = count;
    for (int32_t i = count; i % 16; i++)
        s->weights[i] = 0;
}

INLINE void move_candidate(Scratch *s, int32_t from, int32_t to)
{
    s->ids[to] = s->ids[from];
    s->x[to] = s->x[from];
    s->weights[to] = s->weights[from];
}

#endif
