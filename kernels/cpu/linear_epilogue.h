/* The epilogue of a product: bias, scale, gated activation and residual. */
#ifndef LINEAR_EPILOGUE_H
#define LINEAR_EPILOGUE_H

#include "activation.h"
#include "linear_products.h"

enum OutputKind { OUT, GATE, GATED };

/* The epilogue of group g of a pair, whose sums start at its first weight row. */
typedef struct {
    f32v bias[VECTORS], scale;
    int kind, count, accumulate, is_gelu; /* count: weight rows left */
} Epilogue;

INLINE Epilogue make_epilogue(const Operation *operation, WeightGroups pair, int g)
{
    const WeightPart *part = pair.part;
    Epilogue epilogue = {{splat(0)},
                         splat(operation->scale),
                         OUT,
                         part->rows - GROUP_ROWS * (pair.group + g),
                         operation->accumulate,
                         operation->gated == 2};
    int column = part->first_column + GROUP_ROWS * (pair.group + g);
    if (operation->gated) {
        epilogue.kind = g ? GATED : GATE;
        epilogue.count = GROUP_ROWS;
        column = GROUP_ROWS * (pair.group / 2) + (g ? part->rows / 2 : 0);
    }
    if (operation->weight)
        for (int p = 0; p < VECTORS; p++)
            epilogue.bias[p] = load_partial(
                operation->weight + column + LANES * p, epilogue.count - LANES * p);
    return epilogue;
}

/* Stores one row's sums of vector p in `out`.  Sums of a gate go to `gate`, where the other group's
 * sums find them. */
INLINE void apply_epilogue(const Epilogue *epilogue, int p, f32v sums, float *gate, float *out)
{
    f32v value = (sums + epilogue->bias[p]) * epilogue->scale;
    int count = epilogue->count - LANES * p;
    gate += LANES * p;
    out += LANES * p;
    if (epilogue->kind == GATE) {
        store(gate, value);
        return;
    }
    if (epilogue->kind == GATED)
        value *= activate(load(gate), epilogue->is_gelu);
    else if (epilogue->accumulate)
        value += load_partial(out, count);
    store_partial(out, value, count);
}

/* The place of group g's first sum in row `row` of out. */
INLINE float *output_sums_at(const Operation *operation, WeightGroups pair, int g, int row)
{
    int column = operation->gated ? pair.group / 2 : pair.group + g;
    return operation->out + (int64_t)row * operation->out_stride + pair.part->first_column
           + GROUP_ROWS * column;
}

/* Applies the epilogue to the sums y[g][r][16] of R rows from `row` on; groups are y_rows rows
 * apart. */
INLINE void apply_epilogue_rows(
    const Operation *operation, WeightGroups pair, int row, int R, float *y, int y_rows)
{
    for (int g = 0; g < pair.num_groups; g++) {
        Epilogue epilogue = make_epilogue(operation, pair, g);
        for (int r = 0; r < R; r++)
            for (int p = 0; p < VECTORS; p++)
                apply_epilogue(&epilogue, p, load(y + GROUP_ROWS * (y_rows * g + r) + LANES * p),
                               y + GROUP_ROWS * r, output_sums_at(operation, pair, g, row + r));
    }
}

#endif
