/* Products on CPUs with AMX: few rows by linear_amx_gemv.c, many by linear_amx_gemm.c. */
#ifdef TIER_AMX
#include "linear_amx_scales.h"

void multiply_tiles(
    const Operation *operation, WeightGroups groups, int num_rows, int first, int end)
{
    int row = tile_start(num_rows, first), R = tile_start(num_rows, end) - row;
    if (R <= GEMV_ROWS) {
        for (int i = 0; i < num_pairs(groups); i++)
            run_gemv(operation, pair_of(groups, i), row, R, tile_at(operation, row));
        return;
    }
    run_gemm(operation, groups, num_rows, first, end);
}

void multiply_row(const Operation *operation, WeightGroups pair, int x_row, int out_row)
{
    run_gemv(operation, pair, out_row, 1, tile_at(operation, x_row));
}

#endif
