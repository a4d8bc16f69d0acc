/* Groups of weights times tiles of activations, where there are no matrix registers. */
#ifndef TIER_AMX
#include "linear_blocks.h"
#include "linear_finish.h"

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
        multiply_blocks(part->format, pair.w, pair.num_groups == 1 ? 0 : size, num_blocks, R,
                        tile_at(operation, row), next, y);
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
    multiply_blocks(part->format, pair.w, pair.num_groups == 1 ? 0 : size, part->columns / COLUMNS, 1,
                    tile_at(operation, x_row), (Next){0, 0}, y);
    finish_sums(operation, pair, out_row, 1, y, 1);
}

#endif
