/* The layout of one head's keys, or values, in a block of the KV cache.  D is the padded head
 * dimension.
 *
 * Floats, halves, or signed bytes with a scale for each position:
 *     keys    [D][BLOCK_SIZE]     so that sixteen positions make a vector
 *     values  [BLOCK_SIZE][D]
 *     float   scales[BLOCK_SIZE]  of bytes only
 *
 * int8 planes, where there are int8 dot products (KV_INT8): integers of 16 or 8 bits with a scale
 * for each position, plus 2^15 or 2^7 so that no byte has a sign, split into planes of bytes, the
 * high ones first.  The four bytes that a dot product sums lie side by side: four dimensions of
 * keys, four positions of values.
 *     keys    [plane][D / 4][BLOCK_SIZE][4]
 *     values  [plane][D / 16][BLOCK_SIZE / 4][16][4]
 *     float   scales[BLOCK_SIZE]  the value of 1 in a high byte */
#ifndef KV_CACHE_H
#define KV_CACHE_H

#include "plan.h"

#ifndef KV_BITS
#define KV_BITS 16
#endif

#if defined(TIER_AVX512) && KV_BITS != 32
#define KV_INT8 1
#else
#define KV_INT8 0
#endif

enum { KV_BYTES = KV_BITS / 8, KV_HAS_SCALES = KV_INT8 || KV_BITS == 8 };

static inline int64_t kv_head_bytes(int padded_dim)
{
    return (int64_t)padded_dim * BLOCK_SIZE * KV_BYTES + (KV_HAS_SCALES ? 4 * BLOCK_SIZE : 0);
}

static inline const float *kv_scales(const uint8_t *head, int padded_dim)
{
    return (const float *)(head + (int64_t)padded_dim * BLOCK_SIZE * KV_BYTES);
}

/* Prefetches the cache lines of a slot's block that store_kv is about to write. */
void prefetch_kv(const Plan *plan, int layer, int64_t slot);

/* Stores k and v of one row, [kv head][head_dim] each, in a slot. */
void store_kv(const Plan *plan, int layer, int64_t slot, const float *k, const float *v);

#endif
