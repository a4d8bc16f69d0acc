/* Products by int8 dot products of four, with activations in two planes of bytes, or one.
 *
 * Signed weights are stored plus a zero point.  Starting the integer sums at minus zero point times
 * the sum of the activations takes it off again.
 *
 * One vector holds four columns of sixteen weight rows (linear_formats.h).  Each activation word is
 * broadcast from memory, which is free next to the dot products.  The number of dot products limits
 * many rows, and the bytes of the weights limit a few.  Array sizes must be literals: the compiler
 * makes others variable-length and spills them. */
#ifndef LINEAR_DOT4_H
#define LINEAR_DOT4_H

#include "linear_blocks.h"

#if HAS_DOT4 && !defined(TIER_AMX)
#include "linear_unpack.h"

INLINE i32v initial_dot(int format, int32_t neg_sum)
{
    return zero_point(format) ? splat_int(neg_sum * zero_point(format)) : splat_int(0);
}

/* Neighbouring groups that go through a tile together, and the vectors of their rows. */
enum { TILE_GROUPS = LANES == 16 ? 2 : 1, MAX_VECTORS = TILE_GROUPS * VECTORS };

/* The dot products of one block: V vectors of integers q with R rows of a tile, both planes.  Many
 * rows add the low plane to the shifted high one, in half the registers.  A few rows keep two sums
 * each, so that enough dot products are in flight to hide their latency.  Integers are exact either
 * way. */
INLINE void dot_products(
    const int V,
    const int R,
    const int first, /* words first .. last - 1 of the eight */
    const int last,
    u32v (*q)[MAX_VECTORS],
    const int32_t *tile,
    i32v (*dots)[TILE_ROWS])
{
    if (PLANES == 2 && R >= 4) {
        i32v initial_dot[MAX_VECTORS][TILE_ROWS];
        UNROLL for (int v = 0; v < V; v++) UNROLL for (int r = 0; r < R; r++) {
            initial_dot[v][r] = dots[v][r];
            dots[v][r] = splat_int(0);
        }
        UNROLL for (int j = first; j < last; j++) UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int v = 0; v < V; v++)
                dots[v][r] = dot4(dots[v][r], q[j][v], splat_int(tile[j * R + r]));
        UNROLL for (int v = 0; v < V; v++) UNROLL for (int r = 0; r < R; r++)
            dots[v][r] = (dots[v][r] << 8) + initial_dot[v][r];
        UNROLL for (int j = first; j < last; j++) UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int v = 0; v < V; v++)
                dots[v][r] = dot4(dots[v][r], q[j][v], splat_int(tile[(8 + j) * R + r]));
        return;
    }
    i32v high[MAX_VECTORS][TILE_ROWS];
    UNROLL for (int v = 0; v < V; v++) UNROLL for (int r = 0; r < R; r++) high[v][r] = splat_int(0);
    UNROLL for (int j = first; j < last; j++) UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < V; v++) {
            if (PLANES == 2)
                high[v][r] = dot4(high[v][r], q[j][v], splat_int(tile[j * R + r]));
            i32v x = splat_int(tile[(8 * (PLANES - 1) + j) * R + r]);
            dots[v][r] = dot4(dots[v][r], q[j][v], x);
        }
    if (PLANES == 2)
        UNROLL for (int v = 0; v < V; v++) UNROLL for (int r = 0; r < R; r++)
            dots[v][r] += high[v][r] << 8;
}

/* y[g][r][0..15] for G groups and R rows of a tile.  The sums of many rows stay in memory, because
 * the integers of two groups take half of the registers. */
INLINE void multiply_groups(
    const int format,
    const int G,
    const int R,
    const uint8_t *blocks,
    size_t group_size,
    int num_blocks,
    const int32_t *tile,
    NextWeights next,
    float *y)
{
    const size_t size = block_bytes(format);
    const int V = G * VECTORS;
    UNROLL for (int i = 0; i < V * R; i++) store(y + LANES * i, splat(0));
    for (int k = 0; k < num_blocks; k++, tile += BLOCK_WORDS * R) {
        const uint8_t *w = blocks + block_offset(format, k),
                      *head = blocks + head_offset(format, k);
        const float *d_x = (const float *)(tile + 8 * PLANES * R), *sum_x = d_x + R;
        const int32_t *neg_sum = (const int32_t *)(sum_x + R);
        u32v q[8][MAX_VECTORS];
        i32v dots[MAX_VECTORS][TILE_ROWS];
        prefetch_weights(w, size, &next);
        if (G == 2)
            UNROLL for (size_t u = 0; u < size; u += 64) prefetch(w + group_size + PREFETCH_L1 + u);
        UNROLL for (int v = 0; v < V; v++) {
            UNROLL for (int j = 0; j < 4; j++) unpack_words(format, w + v / VECTORS * group_size, j,
                                                            v % VECTORS, &q[j][v], &q[j + 4][v]);
            UNROLL for (int r = 0; r < R; r++) dots[v][r] = initial_dot(format, neg_sum[r]);
        }
        dot_products(V, R, 0, 8, q, tile, dots);
        UNROLL for (int v = 0; v < V; v++) {
            f32v d, m;
            const size_t group = v / VECTORS * group_size;
            load_scales(format, w + group, head + group, 0, v % VECTORS, &d, &m);
            UNROLL for (int r = 0; r < R; r++) {
                float *at = y + GROUP_ROWS * (R * (v / VECTORS) + r) + LANES * (v % VECTORS);
                f32v sum = fma_v(to_float(dots[v][r]), d * splat(d_x[r]), load(at));
                if (has_minimum(format))
                    sum = fma_v(m, splat(sum_x[r]), sum);
                store(at, sum);
            }
        }
    }
}

/* Q6_K has a scale for each half of a block, so it needs two dot products: one group at a time. */
INLINE void multiply_group_q6_k(
    const int R,
    const uint8_t *blocks,
    int num_blocks,
    const int32_t *tile,
    NextWeights next,
    float *y)
{
    const size_t size = block_bytes(Q6_K);
    UNROLL for (int i = 0; i < VECTORS * R; i++) store(y + LANES * i, splat(0));
    for (int k = 0; k < num_blocks; k++, tile += BLOCK_WORDS * R) {
        const uint8_t *w = blocks + block_offset(Q6_K, k), *own = w + integers_bytes(Q6_K);
        const uint16_t *head = (const uint16_t *)(blocks + head_offset(Q6_K, k));
        const float *d_x = (const float *)(tile + 8 * PLANES * R);
        const int32_t *neg_sum = tile + (8 * PLANES + 2) * R, *neg_half_sum = neg_sum + R;
        prefetch_weights(w, size, &next);
        UNROLL for (int p = 0; p < VECTORS; p++) {
            f32v d = load_f16(head + LANES * p), halves[2][TILE_ROWS];
            u32v q[8][MAX_VECTORS];
            UNROLL for (int j = 0; j < 4; j++) unpack_words(Q6_K, w, j, p, &q[j][0], &q[j + 4][0]);
            UNROLL for (int h = 0; h < 2; h++) {
                i32v dots[1][TILE_ROWS];
                UNROLL for (int r = 0; r < R; r++) dots[0][r] = initial_dot(
                    Q6_K, h ? neg_half_sum[r] : neg_sum[r] - neg_half_sum[r]);
                dot_products(1, R, 4 * h, 4 * h + 4, q, tile, dots);
                UNROLL for (int r = 0; r < R; r++) halves[h][r] = to_float(dots[0][r]);
            }
            f32v s0 = load_i8(own + LANES * p), s1 = load_i8(own + 16 + LANES * p);
            UNROLL for (int r = 0; r < R; r++) {
                float *at = y + GROUP_ROWS * r + LANES * p;
                f32v value = fma_v(halves[1][r], s1, halves[0][r] * s0);
                store(at, fma_v(value, d * splat(d_x[r]), load(at)));
            }
        }
    }
}

/* ---- One function for each format and number of rows */

typedef void (*BlockKernel)(const uint8_t *w,
                            size_t group_size,
                            int num_blocks,
                            const int32_t *tile,
                            NextWeights next,
                            float *y);

#define DEFINE_KERNEL(format, R)                                                                   \
    static void format##_##R(                                                                      \
        const uint8_t *w,                                                                          \
        size_t group_size,                                                                         \
        int num_blocks,                                                                            \
        const int32_t *tile,                                                                       \
        NextWeights next,                                                                          \
        float *y)                                                                                  \
    {                                                                                              \
        if (format == Q6_K) {                                                                      \
            multiply_group_q6_k(R, w, num_blocks, tile, next, y);                                  \
            multiply_group_q6_k(R, w + group_size, num_blocks, tile, next, y + GROUP_ROWS * R);    \
        } else if (R == 1 || TILE_GROUPS == 1) {                                                   \
            multiply_groups(format, 1, R, w, 0, num_blocks, tile, next, y);                        \
            y += GROUP_ROWS * R;                                                                   \
            multiply_groups(format, 1, R, w + group_size, 0, num_blocks, tile, next, y);           \
        } else {                                                                                   \
            multiply_groups(format, 2, R, w, group_size, num_blocks, tile, next, y);               \
        }                                                                                          \
    }

#ifdef TIER_AVX512
#define TILE_SIZES(M, format)                                                                      \
    M(format, 1) M(format, 2) M(format, 3) M(format, 4) M(format, 5) M(format, 6)
#define NAMES(format) {format##_1, format##_2, format##_3, format##_4, format##_5, format##_6}
#else
#define TILE_SIZES(M, format) M(format, 1) M(format, 2) M(format, 3) M(format, 4)
#define NAMES(format) {format##_1, format##_2, format##_3, format##_4}
#endif

/* Of Q4_K, Q5_K and Q6_K (linear_dot4_k.c): two files compile in parallel. */
extern const BlockKernel k_kernels[3][TILE_ROWS];

#endif
#endif
