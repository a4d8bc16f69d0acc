/* Products of groups of weights with tiles of activations, on CPUs without AMX. */
#ifndef TIER_AMX
#include "linear_blocks.h"
#include "linear_epilogue.h"

static void multiply_pair(
    const Operation *operation, WeightGroups pair, int num_rows, int first, int end)
{
    const WeightPart *part = pair.part;
    size_t size = group_bytes(part->format, part->columns);
    int num_blocks = part->columns / BLOCK_COLUMNS, num_lines = (int)(2 * size / 64) + 1;
    int lines_per_block = num_lines / (num_blocks * (end - first) + 1) + 1;
    NextWeights next = {end - first == 1 ? 0 : pair.w + 2 * size, lines_per_block};
    float y[2 * GROUP_ROWS * TILE_ROWS] __attribute__((aligned(64)));
    for (int tile = first; tile < end; tile++) {
        int row = tile_start(num_rows, tile), R = tile_start(num_rows, tile + 1) - row;
        multiply_blocks(part->format, pair.w, pair.num_groups == 1 ? 0 : size, num_blocks, R,
                        tile_at(operation, row), next, y);
        if (next.bytes)
            next.bytes += 64 * (size_t)(lines_per_block * num_blocks);
        if (next.bytes > pair.w + 4 * size)
            next.lines_per_block = 0;
        apply_epilogue_rows(operation, pair, row, R, y, R);
    }
}

void multiply_tiles(
    const Operation *operation, WeightGroups groups, int num_rows, int first, int end)
{
    for (int i = 0; i < num_pairs(groups); i++)
        multiply_pair(operation, pair_of(groups, i), num_rows, first, end);
}

void multiply_row(const Operation *operation, WeightGroups pair, int x_row, int out_row)
{
    const WeightPart *part = pair.part;
    size_t size = group_bytes(part->format, part->columns);
    float y[2 * GROUP_ROWS] __attribute__((aligned(64)));
    multiply_blocks(part->format, pair.w, pair.num_groups == 1 ? 0 : size,
                    part->columns / BLOCK_COLUMNS, 1, tile_at(operation, x_row),
                    (NextWeights){0, 0}, y);
    apply_epilogue_rows(operation, pair, out_row, 1, y, 1);
}

#endif
