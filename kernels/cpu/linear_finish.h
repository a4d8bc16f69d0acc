/* What becomes of the sums of a product: bias, scale, gate and residual. */
#ifndef FINISH_H
#define FINISH_H

#include "activation.h"
#include "linear_products.h"

enum FinishedAs { OUT, GATE, GATED };

/* Of group g of a pair, whose first row of weights is sums[0]. */
typedef struct {
    f32v bias[PARTS], scale;
    int as, count, accumulate, is_gelu; /* count: of the rows of weights that are left */
} Finish;

INLINE Finish finish_of(const Operation *operation, Groups pair, int g)
{
    const Part *part = pair.part;
    Finish finish = {{splat(0)}, splat(operation->scale), OUT, part->rows - ROWS * (pair.group + g),
                     operation->accumulate, operation->gate == 2};
    int column = part->first_column + ROWS * (pair.group + g);
    if (operation->gate) {
        finish.as = g ? GATED : GATE;
        finish.count = ROWS;
        column = ROWS * (pair.group / 2) + (g ? part->rows / 2 : 0);
    }
    if (operation->weight)
        for (int p = 0; p < PARTS; p++)
            finish.bias[p] = load_first(
                operation->weight + column + LANES * p, finish.count - LANES * p);
    return finish;
}

/* One row's sums of part p, to `out`; those of a gate to `gate`, for the sums of the other group. */
INLINE void finish_row(const Finish *finish, int p, f32v sums, float *gate, float *out)
{
    f32v value = (sums + finish->bias[p]) * finish->scale;
    int count = finish->count - LANES * p;
    gate += LANES * p;
    out += LANES * p;
    if (finish->as == GATE) {
        store(gate, value);
        return;
    }
    if (finish->as == GATED)
        value *= activated(load(gate), finish->is_gelu);
    else if (finish->accumulate)
        value += load_first(out, count);
    store_first(out, value, count);
}

/* Where the first sum of group g goes in row `row` of out. */
INLINE float *out_at(const Operation *operation, Groups pair, int g, int row)
{
    int column = operation->gate ? pair.group / 2 : pair.group + g;
    return operation->out + (int64_t)row * operation->out_stride + pair.part->first_column + ROWS * column;
}

/* The sums y[g][r][16], y_rows apart, of R rows from `row` on. */
INLINE void finish_sums(
    const Operation *operation, Groups pair, int row, int R, float *y, int y_rows)
{
    for (int g = 0; g < pair.num_groups; g++) {
        Finish finish = finish_of(operation, pair, g);
        for (int r = 0; r < R; r++)
            for (int p = 0; p < PARTS; p++)
                finish_row(&finish, p, load(y + ROWS * (y_rows * g + r) + LANES * p), y + ROWS * r,
                           out_at(operation, pair, g, row + r));
    }
}

#endif
