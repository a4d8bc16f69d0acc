/* Products of quantised weights with tiles of activations, in one of three arithmetics: linear_dot4.c and
 * linear_madd.c (linear_blocks.h), and linear_amx.c where there are matrix registers. */
#ifndef PRODUCTS_H
#define PRODUCTS_H

#include "linear_formats.h"
#include "plan.h"

/* A unit of work takes so many tiles at most, and so many bytes of them. */
#ifdef TIER_AMX
enum { MAX_CHUNK_TILES = 32, CHUNK_BYTES = 1 << 20 };
#else
enum { MAX_CHUNK_TILES = 1 << 16, CHUNK_BYTES = 512 << 10 };
#endif

/* 32-bit words that one row takes in a tile of `width` columns. */
int tile_words(int width);

/* Floats of scaled rows to the tile at `tile`; R rows of `width` floats, `stride` apart. */
void split_tile(const float *x, int stride, int width, int R, int32_t *tile);

/* Weights at w: neighbours, of which `group` is the first in its part. */
typedef struct {
    const Part *part;
    const uint8_t *w;
    int group, num_groups;
} Groups;

static inline int num_pairs(Groups groups) { return (groups.num_groups + 1) / 2; }

/* Two neighbours, or the last one alone; of an operation with gates a gate and its up. */
static inline Groups pair_of(Groups groups, int i)
{
    size_t size = group_bytes(groups.part->format, groups.part->columns);
    int left = groups.num_groups - 2 * i;
    return (Groups){
        groups.part, groups.w + 2 * size * (size_t)i, groups.group + 2 * i, left < 2 ? left : 2};
}

/* Times tiles first .. end - 1 of the step's rows, finished (linear_finish.h). */
void multiply_tiles(const Operation *operation, Groups groups, int num_rows, int first, int end);

/* A pair times one row, which is a tile by itself. */
void multiply_row(const Operation *operation, Groups pair, int x_row, int out_row);

/* The rows of a step are cut into as few tiles as possible, of nearly equal size. */
static inline int num_tiles(int num_rows) { return (num_rows + TILE - 1) / TILE; }

static inline int tile_start(int num_rows, int tile)
{
    return num_rows == 0 ? 0 : (int)((int64_t)num_rows * tile / num_tiles(num_rows));
}

static inline int32_t *tile_at(const Operation *operation, int row)
{
    return operation->tiles + (int64_t)tile_words(operation->width) * row;
}

#endif
