/* Tiles: the activations of a few rows as integers, in the layout that a tier's products read.
 *
 * The layout differs between the arithmetics: AMX (linear_amx_scales.h), int8 dot products of four
 * (linear_dot4.h), and madd (linear_madd.c).  Whoever writes rows for a product to read next calls
 * quantize_tile; the buffer belongs to the plan. */
#ifndef LINEAR_TILES_H
#define LINEAR_TILES_H

#include "linear_formats.h"
#include "plan.h"
#include "simd.h"

#ifndef ACTIVATION_BITS
#define ACTIVATION_BITS 16
#endif
#define PLANES (ACTIVATION_BITS / 8)

/* TILE_ROWS: the most rows in a tile. */
enum {
#if defined(TIER_AMX)
    TILE_ROWS = 16, /* rows of an AMX tile */
#elif defined(TIER_AVX512)
    TILE_ROWS = 6, /* times two groups of weights: as many sums as registers hold */
#elif defined(TIER_NEON)
    TILE_ROWS = 4, /* times one group */
#else
    STRIPE_ROWS = 4, /* times one group, which is unpacked once for a whole tile */
    TILE_ROWS = 8 * STRIPE_ROWS,
#endif
};

/* ---- The layout of a tile in each arithmetic; tile_words: 32-bit words of one row */

#if defined(TIER_AMX)

enum {
    STEP_COLUMNS = 64,     /* columns in an AMX tile */
    SEGMENT_COLUMNS = 640, /* columns with one scale, at most */
    GEMV_ROWS = 4,         /* up to this many rows use gemv */
};

/* A tile of R rows is
 *     int8   planes[step][2][R][64]  high and low bytes, both signed: 256 high + low
 *     int32  sums[half block][R]     of 16 columns; only if R <= GEMV_ROWS
 *     float  scales[segment][R]
 * Columns of the last step beyond the width are 0. */
static inline int num_steps(int width) { return (width + STEP_COLUMNS - 1) / STEP_COLUMNS; }
static inline int num_segments(int width)
{
    return (width + SEGMENT_COLUMNS - 1) / SEGMENT_COLUMNS;
}

/* Steps in a segment; the last segment may be shorter. */
static inline int segment_steps(int width)
{
    int segments = num_segments(width);
    return (num_steps(width) + segments - 1) / segments;
}

static inline int sums_at(int width, int R) { return num_steps(width) * STEP_COLUMNS / 2 * R; }
static inline int scales_at(int width, int R) { return sums_at(width, R) + width / 16 * R; }

static inline int tile_words(int width) { return scales_at(width, 1) + num_segments(width); }

#elif HAS_DOT4

/* A tile of R rows is cut into blocks of 32 columns, each of
 *     int32  high[8][R]        four columns each, signed bytes
 *     int32  low[8][R]         with 16 bits only: the value is d (256 high + low)
 *     float  d[R]
 *     float  sum[R]            of the 32 values
 *     int32  neg_sum[R]        minus the sum of the 32 integers
 *     int32  neg_half_sum[R]   minus the sum of the last 16
 * With 16 bits the error is 2e-5 of a block's largest value; products then cost twice those of 8
 * bits. */
enum { BLOCK_WORDS = 8 * PLANES + 4 /* for each row and block */ };

static inline int tile_words(int width) { return width / BLOCK_COLUMNS * BLOCK_WORDS; }

#else

/* A tile of R rows is cut into blocks of 32 columns, and each block into stripes of STRIPE_ROWS
 * rows; the last stripe has the rest.  A stripe of S rows is
 *     int32  words[8][PLANES][S]  int16 pairs, as linear_madd.c describes; 8 bits: four bytes
 *     float  d[S]                 the value of 1 in these integers
 *     float  sum[S]               of the 32 values
 *     int32  sums[2][S]           with 8 bits only: of the integers of each half */
enum { WORDS = 8 * PLANES, BLOCK_WORDS = WORDS + (PLANES == 2 ? 2 : 4) /* a row and block */ };

static inline int tile_words(int width) { return width / BLOCK_COLUMNS * BLOCK_WORDS; }

#endif

/* ---- Tiles of a step */

/* Quantizes R rows of `width` floats, `stride` floats apart, to the tile at `tile`. */
void quantize_tile(const float *x, int stride, int width, int R, int32_t *tile);

/* The rows of a step are cut into as few tiles as possible, of nearly equal size. */
static inline int num_tiles(int num_rows) { return (num_rows + TILE_ROWS - 1) / TILE_ROWS; }

static inline int tile_start(int num_rows, int tile)
{
    return num_rows == 0 ? 0 : (int)((int64_t)num_rows * tile / num_tiles(num_rows));
}

static inline int32_t *tile_at(const Operation *operation, int row)
{
    return operation->tiles + (int64_t)tile_words(operation->width) * row;
}

#endif
