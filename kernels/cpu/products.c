/* Products of quantised weights with activations in two planes of bytes, or one.
 *
 * y[r][i] = sum over blocks k of  d_w d_x (q_w . q_x)  +  m_w sum_x
 *
 * in float32, block by block, the dot product of integers exact: the order never depends on the
 * number of rows, so neither do the bits of y.  Signed weights are stored with an offset, taken off
 * again by starting the integers at minus offset times the sum of the activations.
 *
 * One vector holds four columns of sixteen weight rows (formats.h), and each activation word is
 * broadcast from memory, which is free beside the dot products: their number bounds many rows, and
 * the bytes of the weights bound a few.  Sizes of arrays must be literals, or the compiler makes
 * them variable and spills them. */
#ifndef TIER_AMX
#include "finish.h"
#include "unpack.h"

/* A tile of R rows is cut into blocks of 32 columns, each of
 *     int32  high[8][R]    four columns each, signed bytes
 *     int32  low[8][R]     with 16 bits only: the value is d (256 high + low)
 *     float  d[R]
 *     float  sum[R]        of the 32 values
 *     int32  negative[R]   minus the sum of the 32 integers, and
 *     int32  second[R]     of the last 16 of them
 * 16 bits are exact to 2e-5 of a block's largest value; products with them cost two of 8 bits. */
enum { BLOCK_WORDS = 8 * PLANES + 4 /* a row and block */ };

/* Few rows read each weight once, at the speed of memory.  It is fetched to the second-level cache far
 * ahead, where more requests fit than in the first, and from there a little ahead of the product:
 * 143 tokens/s instead of 109 (one thread of a Xeon that reads 14 GB/s). */
enum { AHEAD = 10240, NEAR = 2048 };

/* ---- Activations to tiles */

#if PLANES == 2
static const float LARGEST = 32512; /* 127 * 256: the high byte must not reach 128 */
#else
static const float LARGEST = 127;
#endif

/* Words of 32 values at x, `R` apart. */
INLINE void split_block(const float *x, int R, int32_t *words)
{
    f32x16 x0 = load(x), x1 = load(x + 16);
    float largest = float_of(largest_int(max_int(size_bits(x0), size_bits(x1))));
    float d = largest / LARGEST;
    float inverse = d > 0x1p-120f ? LARGEST / largest : 0; /* of infinity and NaN 0, but d stays */
    int32_t packed[8 * PLANES];
    if (!(largest < INFINITY)) {
        d = NAN;
        inverse = 0;
        x0 = x1 = splat(0);
    }
    i32x16 i0 = to_nearest(x0 * splat(inverse)), i1 = to_nearest(x1 * splat(inverse));
    int32_t second = -sum_int(i1), negative = second - sum_int(i0);
#if PLANES == 2
    store_bytes((int8_t *)packed, (i0 + 128) >> 8);
    store_bytes((int8_t *)packed + 16, (i1 + 128) >> 8);
    store_bytes((int8_t *)packed + 32, i0);
    store_bytes((int8_t *)packed + 48, i1);
#else
    store_bytes((int8_t *)packed, i0);
    store_bytes((int8_t *)packed + 16, i1);
#endif
    for (int i = 0; i < 8 * PLANES; i++)
        words[i * R] = packed[i];
    float value = -d * (float)negative;
    memcpy(words + 8 * PLANES * R, &d, 4);
    memcpy(words + (8 * PLANES + 1) * R, &value, 4);
    words[(8 * PLANES + 2) * R] = negative;
    words[(8 * PLANES + 3) * R] = second;
}

int tile_words(int width) { return width / 32 * BLOCK_WORDS; }

void split_tile(const float *x, int stride, int width, int R, int32_t *tile)
{
    for (int r = 0; r < R; r++)
        for (int k = 0; k < width / 32; k++)
            split_block(x + (int64_t)r * stride + 32 * k, R, tile + BLOCK_WORDS * R * k + r);
}

/* ---- Products */

INLINE i32x16 start(int format, int32_t negative)
{
    return offset_of(format) ? splat_int(negative * offset_of(format)) : splat_int(0);
}

/* What one tile has to fetch of the weights that come next, all tiles together all of it. */
typedef struct {
    const uint8_t *bytes; /* null: what lies AHEAD */
    int lines_a_block;
} Next;

INLINE void fetch_ahead(const uint8_t *w, size_t size, Next *next)
{
    UNROLL for (size_t u = 0; u < size; u += 64) prefetch(w + NEAR + u);
    if (next->bytes) {
        for (int u = 0; u < next->lines_a_block; u++, next->bytes += 64)
            prefetch_far(next->bytes);
    } else {
        UNROLL for (size_t u = 0; u < size; u += 64) prefetch_far(w + AHEAD + u);
    }
}

/* The dot products of one block: G groups of integers q with R rows of a tile, both planes.  Many
 * rows add the low plane to the shifted high one, in half the registers; a few keep two sums each,
 * so that enough products are in flight to hide their latency.  Integers are exact either way. */
INLINE void dot_products(
    const int G,
    const int R,
    const int first, /* words first .. last - 1 of the eight */
    const int last,
    u32x16 (*q)[2],
    const int32_t *tile,
    i32x16 (*dots)[TILE])
{
    if (PLANES == 2 && R >= 4) {
        i32x16 start[2][TILE];
        UNROLL for (int g = 0; g < G; g++) UNROLL for (int r = 0; r < R; r++) {
            start[g][r] = dots[g][r];
            dots[g][r] = splat_int(0);
        }
        UNROLL for (int j = first; j < last; j++) UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int g = 0; g < G; g++)
                dots[g][r] = dot4(dots[g][r], q[j][g], splat_int(tile[j * R + r]));
        UNROLL for (int g = 0; g < G; g++) UNROLL for (int r = 0; r < R; r++)
            dots[g][r] = (dots[g][r] << 8) + start[g][r];
        UNROLL for (int j = first; j < last; j++) UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int g = 0; g < G; g++)
                dots[g][r] = dot4(dots[g][r], q[j][g], splat_int(tile[(8 + j) * R + r]));
        return;
    }
    i32x16 high[2][TILE];
    UNROLL for (int g = 0; g < G; g++) UNROLL for (int r = 0; r < R; r++) high[g][r] = splat_int(0);
    UNROLL for (int j = first; j < last; j++) UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int g = 0; g < G; g++) {
            if (PLANES == 2)
                high[g][r] = dot4(high[g][r], q[j][g], splat_int(tile[j * R + r]));
            i32x16 x = splat_int(tile[(8 * (PLANES - 1) + j) * R + r]);
            dots[g][r] = dot4(dots[g][r], q[j][g], x);
        }
    if (PLANES == 2)
        UNROLL for (int g = 0; g < G; g++) UNROLL for (int r = 0; r < R; r++)
            dots[g][r] += high[g][r] << 8;
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
    UNROLL for (int i = 0; i < G * R; i++) store(y + ROWS * i, splat(0));
    for (int k = 0; k < num_blocks; k++, tile += BLOCK_WORDS * R) {
        const uint8_t *w = blocks + block_at(format, k), *head = blocks + head_at(format, k);
        const float *d_x = (const float *)(tile + 8 * PLANES * R), *sum_x = d_x + R;
        const int32_t *negative = (const int32_t *)(sum_x + R);
        u32x16 q[8][2];
        i32x16 dots[2][TILE];
        fetch_ahead(w, size, &next);
        if (G == 2)
            UNROLL for (size_t u = 0; u < size; u += 64) prefetch(w + group_size + NEAR + u);
        UNROLL for (int g = 0; g < G; g++) {
            UNROLL for (int j = 0; j < 4; j++)
                integers(format, w + g * group_size, j, &q[j][g], &q[j + 4][g]);
            UNROLL for (int r = 0; r < R; r++) dots[g][r] = start(format, negative[r]);
        }
        dot_products(G, R, 0, 8, q, tile, dots);
        UNROLL for (int g = 0; g < G; g++) {
            f32x16 d, m;
            scales(format, w + g * group_size, head + g * group_size, 0, &d, &m);
            UNROLL for (int r = 0; r < R; r++) {
                float *at = y + ROWS * (R * g + r);
                f32x16 sum = fma16(to_float(dots[g][r]), d * splat(d_x[r]), load(at));
                if (has_minimum(format))
                    sum = fma16(m, splat(sum_x[r]), sum);
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
    UNROLL for (int r = 0; r < R; r++) store(y + ROWS * r, splat(0));
    for (int k = 0; k < num_blocks; k++, tile += BLOCK_WORDS * R) {
        const uint8_t *w = blocks + block_at(Q6_K, k), *own = w + integers_bytes(Q6_K);
        const float *d_x = (const float *)(tile + 8 * PLANES * R);
        const int32_t *negative = tile + (8 * PLANES + 2) * R, *second = negative + R;
        f32x16 d = load_half((const uint16_t *)(blocks + head_at(Q6_K, k)));
        u32x16 q[8][2];
        f32x16 halves[2][TILE];
        fetch_ahead(w, size, &next);
        UNROLL for (int j = 0; j < 4; j++) integers(Q6_K, w, j, &q[j][0], &q[j + 4][0]);
        UNROLL for (int h = 0; h < 2; h++) {
            i32x16 dots[2][TILE];
            UNROLL for (int r = 0; r < R; r++)
                dots[0][r] = start(Q6_K, h ? second[r] : negative[r] - second[r]);
            dot_products(1, R, 4 * h, 4 * h + 4, q, tile, dots);
            UNROLL for (int r = 0; r < R; r++) halves[h][r] = to_float(dots[0][r]);
        }
        f32x16 s0 = load_signed_bytes(own), s1 = load_signed_bytes(own + 16);
        UNROLL for (int r = 0; r < R; r++) {
            f32x16 value = fma16(halves[1][r], s1, halves[0][r] * s0);
            store(y + ROWS * r, fma16(value, d * splat(d_x[r]), load(y + ROWS * r)));
        }
    }
}

/* ---- One function for each format and number of rows */

typedef void (*Product)(
    const uint8_t *w,
    size_t group_size,
    int num_blocks,
    const int32_t *tile,
    Next next,
    float *y);

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
        } else if (R == 1) {                                                                       \
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
#define TILE_SIZES(M, format) M(format, 1) M(format, 2)
#define NAMES(format) {format##_1, format##_2}
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

/* ---- Groups times tiles */

static void multiply_pair(const Operation *operation, Groups pair, int num_rows, int first, int end)
{
    const Part *part = pair.part;
    size_t size = group_bytes(part->format, part->columns);
    int num_blocks = part->columns / COLUMNS, num_lines = (int)(2 * size / 64) + 1;
    int lines_a_block = num_lines / (num_blocks * (end - first) + 1) + 1;
    Next next = {end - first == 1 ? 0 : pair.w + 2 * size, lines_a_block};
    float y[2 * ROWS * TILE] __attribute__((aligned(64)));
    for (int tile = first; tile < end; tile++) {
        int row = tile_start(num_rows, tile), R = tile_start(num_rows, tile + 1) - row;
        products[part->format][R - 1](
            pair.w, pair.num_groups == 1 ? 0 : size, num_blocks, tile_at(operation, row), next, y);
        if (next.bytes)
            next.bytes += 64 * (size_t)(lines_a_block * num_blocks);
        if (next.bytes > pair.w + 4 * size)
            next.lines_a_block = 0;
        finish_sums(operation, pair, row, R, y, R);
    }
}

void multiply_tiles(const Operation *operation, Groups groups, int num_rows, int first, int end)
{
    for (int i = 0; i < num_pairs(groups); i++)
        multiply_pair(operation, pair_of(groups, i), num_rows, first, end);
}

void multiply_row(const Operation *operation, Groups pair, int x_row, int out_row)
{
    const Part *part = pair.part;
    size_t size = group_bytes(part->format, part->columns);
    float y[2 * ROWS] __attribute__((aligned(64)));
    products[part->format][0](
        pair.w, pair.num_groups == 1 ? 0 : size, part->columns / COLUMNS,
        tile_at(operation, x_row), (Next){0, 0}, y);
    finish_sums(operation, pair, out_row, 1, y, 1);
}

#endif
