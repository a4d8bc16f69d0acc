/* Quantizes activations to tiles for linear_dot4.h, and chooses the product by format. */
#include "linear_dot4.h"

#if HAS_DOT4 && !defined(TIER_AMX)

/* Quantizes 32 values at x to words, `R` apart. */
INLINE void quantize_block_words(const float *x, int R, int32_t *words)
{
    QuantizedBlock block = quantize_block(x);
    int32_t packed[8 * PLANES];
    int8_t *bytes = (int8_t *)packed;
    UNROLL for (int v = 0; v < 2 * VECTORS; v++, bytes += LANES) {
        if (PLANES == 2)
            store_low_bytes(bytes, (block.q[v] + 128) >> 8);
        store_low_bytes(bytes + BLOCK_COLUMNS * (PLANES - 1), block.q[v]);
    }
    for (int i = 0; i < 8 * PLANES; i++)
        words[i * R] = packed[i];
    int32_t neg_half_sum = -half_sum(&block, 1), neg_sum = neg_half_sum - half_sum(&block, 0);
    float sum = -block.d * (float)neg_sum;
    memcpy(words + 8 * PLANES * R, &block.d, 4);
    memcpy(words + (8 * PLANES + 1) * R, &sum, 4);
    words[(8 * PLANES + 2) * R] = neg_sum;
    words[(8 * PLANES + 3) * R] = neg_half_sum;
}

void quantize_tile(const float *x, int stride, int width, int R, int32_t *tile)
{
    for (int r = 0; r < R; r++)
        for (int k = 0; k < width / BLOCK_COLUMNS; k++)
            quantize_block_words(x + (int64_t)r * stride + BLOCK_COLUMNS * k, R,
                                 tile + BLOCK_WORDS * R * k + r);
}

/* ---- Products */

TILE_SIZES(DEFINE_KERNEL, Q4_0)
TILE_SIZES(DEFINE_KERNEL, Q4_1)
TILE_SIZES(DEFINE_KERNEL, Q5_0)
TILE_SIZES(DEFINE_KERNEL, Q5_1)
TILE_SIZES(DEFINE_KERNEL, Q8_0)

static const BlockKernel kernels[][TILE_ROWS] = {
    [Q4_0] = NAMES(Q4_0), [Q4_1] = NAMES(Q4_1), [Q5_0] = NAMES(Q5_0), [Q5_1] = NAMES(Q5_1),
    [Q8_0] = NAMES(Q8_0),
};

void multiply_blocks(
    int format,
    const uint8_t *w,
    size_t group_size,
    int num_blocks,
    int R,
    const int32_t *tile,
    NextWeights next,
    float *y)
{
    BlockKernel kernel =
        format < Q4_K ? kernels[format][R - 1] : k_kernels[format - Q4_K][R - 1];
    kernel(w, group_size, num_blocks, tile, next, y);
}

#endif
