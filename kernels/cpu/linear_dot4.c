/* Products with activations in two planes of bytes, or one, where dot4 multiplies bytes.
 *
 * Signed weights are stored with an offset, taken off again by starting the integers at minus offset
 * times the sum of the activations.
 *
 * One vector holds four columns of sixteen weight rows (linear_formats.h), and each activation word is
 * broadcast from memory, which is free beside the dot products: their number bounds many rows, and
 * the bytes of the weights bound a few.  Sizes of arrays must be literals, or the compiler makes
 * them variable and spills them. */
#include "linear_blocks.h"

#if HAS_DOT4 && !defined(TIER_AMX)
#include "linear_unpack.h"

/* ---- Activations to tiles */

/* Words of 32 values at x, `R` apart. */
INLINE void split_block(const float *x, int R, int32_t *words)
{
    Integers integers = integers_of(x);
    int32_t packed[8 * PLANES];
    int8_t *bytes = (int8_t *)packed;
    UNROLL for (int v = 0; v < 2 * PARTS; v++, bytes += LANES) {
        if (PLANES == 2)
            store_bytes(bytes, (integers.q[v] + 128) >> 8);
        store_bytes(bytes + COLUMNS * (PLANES - 1), integers.q[v]);
    }
    for (int i = 0; i < 8 * PLANES; i++)
        words[i * R] = packed[i];
    int32_t second = -sum_of_half(&integers, 1), negative = second - sum_of_half(&integers, 0);
    float sum = -integers.d * (float)negative;
    memcpy(words + 8 * PLANES * R, &integers.d, 4);
    memcpy(words + (8 * PLANES + 1) * R, &sum, 4);
    words[(8 * PLANES + 2) * R] = negative;
    words[(8 * PLANES + 3) * R] = second;
}

void split_tile(const float *x, int stride, int width, int R, int32_t *tile)
{
    for (int r = 0; r < R; r++)
        for (int k = 0; k < width / COLUMNS; k++)
            split_block(x + (int64_t)r * stride + COLUMNS * k, R, tile + BLOCK_WORDS * R * k + r);
}

/* ---- Products */

INLINE i32v start(int format, int32_t negative)
{
    return offset_of(format) ? splat_int(negative * offset_of(format)) : splat_int(0);
}

/* Neighbouring groups that go through a tile together, and the vectors of their rows. */
enum { GROUPS = LANES == 16 ? 2 : 1, MOST_VECTORS = GROUPS * PARTS };

/* The dot products of one block: V vectors of integers q with R rows of a tile, both planes.  Many
 * rows add the low plane to the shifted high one, in half the registers; a few keep two sums each,
 * so that enough products are in flight to hide their latency.  Integers are exact either way. */
INLINE void dot_products(
    const int V,
    const int R,
    const int first, /* words first .. last - 1 of the eight */
    const int last,
    u32v (*q)[MOST_VECTORS],
    const int32_t *tile,
    i32v (*dots)[TILE])
{
    if (PLANES == 2 && R >= 4) {
        i32v start[MOST_VECTORS][TILE];
        UNROLL for (int v = 0; v < V; v++) UNROLL for (int r = 0; r < R; r++) {
            start[v][r] = dots[v][r];
            dots[v][r] = splat_int(0);
        }
        UNROLL for (int j = first; j < last; j++) UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int v = 0; v < V; v++)
                dots[v][r] = dot4(dots[v][r], q[j][v], splat_int(tile[j * R + r]));
        UNROLL for (int v = 0; v < V; v++) UNROLL for (int r = 0; r < R; r++)
            dots[v][r] = (dots[v][r] << 8) + start[v][r];
        UNROLL for (int j = first; j < last; j++) UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int v = 0; v < V; v++)
                dots[v][r] = dot4(dots[v][r], q[j][v], splat_int(tile[(8 + j) * R + r]));
        return;
    }
    i32v high[MOST_VECTORS][TILE];
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

/* y[g][r][0..15] for G groups and R rows of a tile; the sums of many rows stay in memory, since the
 * integers of two groups take half of the registers. */
INLINE void product(
    const int format,
    const int G,
    const int R,
    const uint8_t *blocks,
    size_t group_size,
    int num_blocks,
    const int32_t *tile,
    Next next,
    float *y)
{
    const size_t size = block_bytes(format);
    const int V = G * PARTS;
    UNROLL for (int i = 0; i < V * R; i++) store(y + LANES * i, splat(0));
    for (int k = 0; k < num_blocks; k++, tile += BLOCK_WORDS * R) {
        const uint8_t *w = blocks + block_at(format, k), *head = blocks + head_at(format, k);
        const float *d_x = (const float *)(tile + 8 * PLANES * R), *sum_x = d_x + R;
        const int32_t *negative = (const int32_t *)(sum_x + R);
        u32v q[8][MOST_VECTORS];
        i32v dots[MOST_VECTORS][TILE];
        fetch_ahead(w, size, &next);
        if (G == 2)
            UNROLL for (size_t u = 0; u < size; u += 64) prefetch(w + group_size + NEAR + u);
        UNROLL for (int v = 0; v < V; v++) {
            UNROLL for (int j = 0; j < 4; j++)
                integers(format, w + v / PARTS * group_size, j, v % PARTS, &q[j][v], &q[j + 4][v]);
            UNROLL for (int r = 0; r < R; r++) dots[v][r] = start(format, negative[r]);
        }
        dot_products(V, R, 0, 8, q, tile, dots);
        UNROLL for (int v = 0; v < V; v++) {
            f32v d, m;
            const size_t group = v / PARTS * group_size;
            scales(format, w + group, head + group, 0, v % PARTS, &d, &m);
            UNROLL for (int r = 0; r < R; r++) {
                float *at = y + ROWS * (R * (v / PARTS) + r) + LANES * (v % PARTS);
                f32v sum = fma_v(to_float(dots[v][r]), d * splat(d_x[r]), load(at));
                if (has_minimum(format))
                    sum = fma_v(m, splat(sum_x[r]), sum);
                store(at, sum);
            }
        }
    }
}

/* Q6_K has a scale for each half of a block, and so two dot products: one group at a time. */
INLINE void product_q6_k(
    const int R, const uint8_t *blocks, int num_blocks, const int32_t *tile, Next next, float *y)
{
    const size_t size = block_bytes(Q6_K);
    UNROLL for (int i = 0; i < PARTS * R; i++) store(y + LANES * i, splat(0));
    for (int k = 0; k < num_blocks; k++, tile += BLOCK_WORDS * R) {
        const uint8_t *w = blocks + block_at(Q6_K, k), *own = w + integers_bytes(Q6_K);
        const uint16_t *head = (const uint16_t *)(blocks + head_at(Q6_K, k));
        const float *d_x = (const float *)(tile + 8 * PLANES * R);
        const int32_t *negative = tile + (8 * PLANES + 2) * R, *second = negative + R;
        fetch_ahead(w, size, &next);
        UNROLL for (int p = 0; p < PARTS; p++) {
            f32v d = load_half(head + LANES * p), halves[2][TILE];
            u32v q[8][MOST_VECTORS];
            UNROLL for (int j = 0; j < 4; j++) integers(Q6_K, w, j, p, &q[j][0], &q[j + 4][0]);
            UNROLL for (int h = 0; h < 2; h++) {
                i32v dots[1][TILE];
                UNROLL for (int r = 0; r < R; r++)
                    dots[0][r] = start(Q6_K, h ? second[r] : negative[r] - second[r]);
                dot_products(1, R, 4 * h, 4 * h + 4, q, tile, dots);
                UNROLL for (int r = 0; r < R; r++) halves[h][r] = to_float(dots[0][r]);
            }
            f32v s0 = load_signed_bytes(own + LANES * p), s1 = load_signed_bytes(own + 16 + LANES * p);
            UNROLL for (int r = 0; r < R; r++) {
                float *at = y + ROWS * r + LANES * p;
                f32v value = fma_v(halves[1][r], s1, halves[0][r] * s0);
                store(at, fma_v(value, d * splat(d_x[r]), load(at)));
            }
        }
    }
}

/* ---- One function for each format and number of rows */

typedef void (*Product)(
    const uint8_t *w, size_t group_size, int num_blocks, const int32_t *tile, Next next, float *y);

#define ONE(format, R)                                                                             \
    static void format##_##R(                                                                      \
        const uint8_t *w,                                                                          \
        size_t group_size,                                                                         \
        int num_blocks,                                                                            \
        const int32_t *tile,                                                                       \
        Next next,                                                                                 \
        float *y)                                                                                  \
    {                                                                                              \
        if (format == Q6_K) {                                                                      \
            product_q6_k(R, w, num_blocks, tile, next, y);                                         \
            product_q6_k(R, w + group_size, num_blocks, tile, next, y + ROWS * R);                 \
        } else if (R == 1 || GROUPS == 1) {                                                        \
            product(format, 1, R, w, 0, num_blocks, tile, next, y);                                \
            product(format, 1, R, w + group_size, 0, num_blocks, tile, next, y + ROWS * R);        \
        } else {                                                                                   \
            product(format, 2, R, w, group_size, num_blocks, tile, next, y);                       \
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

TILE_SIZES(ONE, Q4_0)
TILE_SIZES(ONE, Q4_1)
TILE_SIZES(ONE, Q5_0)
TILE_SIZES(ONE, Q5_1)
TILE_SIZES(ONE, Q8_0)
TILE_SIZES(ONE, Q4_K)
TILE_SIZES(ONE, Q5_K)
TILE_SIZES(ONE, Q6_K)

static const Product products[NUM_FORMATS][TILE] = {
    [Q4_0] = NAMES(Q4_0), [Q4_1] = NAMES(Q4_1), [Q5_0] = NAMES(Q5_0), [Q5_1] = NAMES(Q5_1),
    [Q8_0] = NAMES(Q8_0), [Q4_K] = NAMES(Q4_K), [Q5_K] = NAMES(Q5_K), [Q6_K] = NAMES(Q6_K),
};

void multiply_blocks(
    int format,
    const uint8_t *w,
    size_t group_size,
    int num_blocks,
    int R,
    const int32_t *tile,
    Next next,
    float *y)
{
    products[format][R - 1](w, group_size, num_blocks, tile, next, y);
}

#endif
