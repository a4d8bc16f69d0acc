/* Products of quantized blocks in one of two arithmetics: int8 dot products of four
 * (linear_dot4.h), or int16 pairs by madd (linear_madd.c), as the tier has dot4 or not.
 *
 * y[r][i] = sum over blocks k of  d_w d_x (q_w . q_x)  +  m_w sum_x
 *
 * in float32, block by block, with exact integer dot products.  The order of sums never depends on
 * the number of rows, so neither do the bits of y. */
#ifndef LINEAR_BLOCKS_H
#define LINEAR_BLOCKS_H

#include "linear_tiles.h"

/* Few rows read each weight once, at the speed of memory.  Weights are prefetched to the L2 cache
 * far ahead, because it takes more outstanding requests than L1, and from there to L1 shortly
 * before use: 143 tokens/s instead of 109 (one thread of a Xeon that reads 14 GB/s).  In bytes. */
enum { PREFETCH_L2 = 10240, PREFETCH_L1 = 2048 };

/* The share of the next weights that one tile prefetches; all tiles together prefetch all of
 * them. */
typedef struct {
    const uint8_t *bytes; /* null: prefetch PREFETCH_L2 ahead */
    int lines_per_block;
} NextWeights;

INLINE void prefetch_weights(const uint8_t *w, size_t size, NextWeights *next)
{
    UNROLL for (size_t u = 0; u < size; u += 64) prefetch(w + PREFETCH_L1 + u);
    if (next->bytes) {
        for (int u = 0; u < next->lines_per_block; u++, next->bytes += 64)
            prefetch_far(next->bytes);
    } else {
        UNROLL for (size_t u = 0; u < size; u += 64) prefetch_far(w + PREFETCH_L2 + u);
    }
}

/* y[2][R][16] of two neighbouring groups, group_size bytes apart, and a tile of R rows. */
void multiply_blocks(
    int format,
    const uint8_t *w,
    size_t group_size,
    int num_blocks,
    int R,
    const int32_t *tile,
    NextWeights next,
    float *y);

#if PLANES == 2
static const float ACTIVATION_MAX = 32512; /* 127 * 256: the high byte must not reach 128 */
#else
static const float ACTIVATION_MAX = 127;
#endif

/* 32 values as integers, and the value of 1.  With 16 bits the error is 2e-5 of the largest
 * value. */
typedef struct {
    i32v q[2 * VECTORS];
    float d;
} QuantizedBlock;

INLINE QuantizedBlock quantize_block(const float *x)
{
    QuantizedBlock block;
    i32v sizes = splat_int(0);
    UNROLL for (int v = 0; v < 2 * VECTORS; v++)
        sizes = max_int(sizes, abs_bits(load(x + LANES * v)));
    float largest = float_from_bits(reduce_max_int(sizes));
    int is_finite = largest < INFINITY;
    block.d = is_finite ? largest / ACTIVATION_MAX : NAN;
    float inverse = is_finite && block.d > 0x1p-120f ? ACTIVATION_MAX / largest : 0;
    UNROLL for (int v = 0; v < 2 * VECTORS; v++) {
        f32v scaled = load(x + LANES * v) * splat(inverse);
        block.q[v] = round_to_int(is_finite ? scaled : splat(0));
    }
    return block;
}

/* The sum of one half of them. */
INLINE int32_t half_sum(const QuantizedBlock *integers, int half)
{
    i32v sum = splat_int(0);
    UNROLL for (int p = 0; p < VECTORS; p++) sum += integers->q[VECTORS * half + p];
    return reduce_add_int(sum);
}

#endif
