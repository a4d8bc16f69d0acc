/* Tiles: the activations of a few rows as integers, as products read them. */
#ifndef LINEAR_TILES_H
#define LINEAR_TILES_H

#include "linear_formats.h"
#include "plan.h"
#include "simd.h"

#ifndef ACTIVATION_BITS
#define ACTIVATION_BITS 16
#endif
#define PLANES (ACTIVATION_BITS / 8)

/* A tile is the activations of so many rows at most; its form is its products' own (linear_tiles.h). */
enum {
#if defined(TIER_AMX)
    TILE_ROWS = 16, /* rows of a matrix register */
#elif defined(TIER_AVX512)
    TILE_ROWS = 6, /* rows by two groups of weights: as many sums as registers hold */
#elif defined(TIER_NEON)
    TILE_ROWS = 4, /* rows by one group */
#else
    STRIPE_ROWS = 4, /* rows by one group; the group is taken apart once for a tile */
    TILE_ROWS = 8 * STRIPE_ROWS,
#endif
};

/* ---- The layout of a tile in each arithmetic; tile_words: 32-bit words of one row */

#if defined(TIER_AMX)

enum {
    STEP_COLUMNS = 64,     /* columns of a matrix register */
    SEGMENT_COLUMNS = 640, /* columns with one scale, at most */
    GEMV_ROWS = 4,       /* rows for which weights are not made planes */
};

/* A tile of R rows is
 *     int8   planes[step][2][R][64]  high and low bytes, both signed: 256 high + low
 *     int32  sums[half block][R]     of 16 columns; only where R <= GEMV_ROWS
 *     float  scales[stretch][R]
 * Columns beyond the width, in the last step, are 0. */
static inline int num_steps(int width) { return (width + STEP_COLUMNS - 1) / STEP_COLUMNS; }
static inline int num_segments(int width)
{
    return (width + SEGMENT_COLUMNS - 1) / SEGMENT_COLUMNS;
}

/* All but the last are equally long. */
static inline int segment_steps(int width)
{
    int stretches = num_segments(width);
    return (num_steps(width) + stretches - 1) / stretches;
}

static inline int sums_at(int width, int R) { return num_steps(width) * STEP_COLUMNS / 2 * R; }
static inline int scales_at(int width, int R) { return sums_at(width, R) + width / 16 * R; }

static inline int tile_words(int width) { return scales_at(width, 1) + num_segments(width); }

#elif HAS_DOT4

/* A tile of R rows is cut into blocks of 32 columns, each of
 *     int32  high[8][R]    four columns each, signed bytes
 *     int32  low[8][R]     with 16 bits only: the value is d (256 high + low)
 *     float  d[R]
 *     float  sum[R]        of the 32 values
 *     int32  negative[R]   minus the sum of the 32 integers, and
 *     int32  second[R]     of the last 16 of them
 * 16 bits are exact to 2e-5 of a block's largest value; products with them cost two of 8 bits. */
enum { BLOCK_WORDS = 8 * PLANES + 4 /* a row and block */ };

static inline int tile_words(int width) { return width / BLOCK_COLUMNS * BLOCK_WORDS; }

#else

/* A tile of R rows is cut into blocks of 32 columns, and each of these into stripes of STRIPE_ROWS rows, of
 * which the last has what is left.  A stripe of S rows is
 *     int32  words[8][PLANES][S]  pairs of a word, 4 j and 4 j + 2 and the others, or its bytes
 *     float  d[S]                 what 1 of these integers is worth
 *     float  sum[S]               of the 32 values
 *     int32  sums[2][S]           with 8 bits only: of the integers of each half */
enum { WORDS = 8 * PLANES, BLOCK_WORDS = WORDS + (PLANES == 2 ? 2 : 4) /* a row and block */ };

static inline int tile_words(int width) { return width / BLOCK_COLUMNS * BLOCK_WORDS; }

#endif

/* ---- Tiles of a step */

/* Floats of scaled rows to the tile at `tile`; R rows of `width` floats, `stride` apart. */
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
