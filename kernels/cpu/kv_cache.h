/* What one head's keys, or values, of a block of the cache look like, D being the padded dimension.
 *
 * Floats, halves, or signed bytes with a scale for each position:
 *     keys    [D][BLOCK_SIZE]     so that sixteen positions are a vector
 *     values  [BLOCK_SIZE][D]
 *     float   scales[BLOCK_SIZE]  of bytes
 *
 * QuantizedBlock, where there are products of bytes (KV_INT8): of 16 or 8 bits, with a scale for each
 * position, 2^15 or 2^7 added so that no byte has a sign, in planes of bytes, the high ones first.
 * Four that a product sums up lie side by side: dimensions of keys, positions of values.
 *     keys    [plane][D / 4][BLOCK_SIZE][4]
 *     values  [plane][D / 16][BLOCK_SIZE / 4][16][4]
 *     float   scales[BLOCK_SIZE]  what 1 of a high byte is worth */
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

/* Has the cache lines of a slot's block fetched, that store_kv is to write soon. */
void prefetch_kv(const Plan *plan, int layer, int64_t slot);

/* k and v, [kv head][head_dim] each, of one row to their places. */
void store_kv(const Plan *plan, int layer, int64_t slot, const float *k, const float *v);

#endif
