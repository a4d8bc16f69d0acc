/* What is left of a vocabulary: the largest logits, the smallest keys. */
#ifndef SAMPLE_SELECT_H
#define SAMPLE_SELECT_H

#include "simd.h"

/* Arrays over the vocabulary are padded to whole strides with ids that are never kept. */
enum { STRIDE = 64 };

typedef struct {
    int32_t size; /* padded */
    float *adjusted, *maxima; /* maxima: of each stride */
    int64_t *sums;            /* of each stride's weights */

    /* The ids that are left, in ascending order, and what is known of each. */
    int32_t count, *ids;
    float *x;
    uint32_t *keys; /* the smallest are kept */
    int64_t *weights;
} Scratch;

/* What is drawn from; x of an id is (logit - best) / temperature. */
typedef struct {
    const float *logits;
    int32_t vocab_size;
    float best, temperature; /* best: the largest */
} LogitRow;

int64_t scratch_bytes(int32_t vocab_size);
Scratch scratch_at(uint8_t *memory, int32_t vocab_size);

/* The last vector of a row, whose other lanes can never be largest. */
INLINE f32v load_padded(const float *p, int32_t left)
{
    f32v x = splat(-INFINITY);
    if (left >= LANES)
        return load(p);
    memcpy(&x, p, sizeof(float) * (size_t)(left > 0 ? left : 0));
    return x;
}

/* x of a vector of ids from i on.  Dividing by 1 changes nothing, but takes its time. */
INLINE f32v scaled_logits(const LogitRow *row, int32_t i)
{
    f32v x = load_padded(row->logits + i, row->vocab_size - i) - splat(row->best);
    return row->temperature == 1 ? x : x / splat(row->temperature);
}

/* Fills `maxima`.  The largest of them is returned; NaN where a logit is NaN, or the largest is
 * infinite. */
float max_logit(const Scratch *s, const float *logits, int32_t vocab_size);

/* The lowest id of the largest logit. */
int32_t argmax(const Scratch *s, const LogitRow *row);

/* A number that at least k logits are not below: the k-th largest of the maxima. */
float kth_largest_bound(const Scratch *s, int32_t k);

/* Leaves, of the strides from id `first` to `end`, the ids whose x is not below `least`. */
void gather_candidates(Scratch *s, const LogitRow *row, int32_t first, int32_t end, float least);

/* Keeps the k largest x, of equals the first. */
void keep_top_k(Scratch *s, int32_t k);

/* Keeps the smallest keys until their amounts (each 1 where null) reach the goal, of equals the
 * first. */
void keep_smallest(Scratch *s, const int64_t *amounts, int64_t goal);

/* The keys of floats ascend as the floats fall; those of 0 and -0 are equal. */
INLINE uint32_t key_of(float value)
{
    uint32_t bits;
    value += 0.0f;
    memcpy(&bits, &value, sizeof bits);
    return bits >> 31 ? bits : ~bits & 0x7fffffff;
}

/* What follows are the first so many; the weights past the last become 0, to a whole vector. */
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
