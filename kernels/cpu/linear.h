/* LINEAR: out = (x W' + bias) * scale, or out += that. */
#ifndef LINEAR_H
#define LINEAR_H

#include "plan.h"

/* The work of one thread's queue, in units of two groups of weights and a chunk of rows. */
int linear_units(const Operation *operation, int num_rows, int queue);
void linear_run(const Operation *operation, int num_rows, int queue, int unit);

/* For experts: pairs of groups in a queue, and one pair for one row, a tile by itself. */
int linear_pairs(const Operation *operation, int queue);
void linear_run_row(
    const Operation *operation, const Part *parts, int queue, int pair, int x_row, int out_row);

/* Floats of scaled rows to the tile at `tile`; R rows of `width` floats, `stride` apart. */
void split_tile(const float *x, int stride, int width, int R, int32_t *tile);

/* The rows of a step are cut into as few tiles as possible, of nearly equal size. */
static inline int num_tiles(int num_rows) { return (num_rows + TILE - 1) / TILE; }

static inline int tile_start(int num_rows, int tile)
{
    return num_rows == 0 ? 0 : (int)((int64_t)num_rows * tile / num_tiles(num_rows));
}

static inline int32_t *tile_at(const Operation *operation, int first)
{
    return operation->tiles + (int64_t)TILE_WORDS * first * (operation->width / 32);
}

#endif
