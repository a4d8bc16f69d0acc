#include "norm.h"
#include "rows.h"

void norm_row(const float *x, const float *weight, int width, float eps, float *out, int adds)
{
    f32v squares = splat(0);
    FOR_VECTORS(i, width) {
        f32v v = load_partial(x + i, lanes_left(width, i));
        squares = fma_v(v, v, squares);
    }
    f32v factor = splat(1 / sqrtf(reduce_add(squares) / (float)width + eps));
    FOR_VECTORS(i, width) {
        int n = lanes_left(width, i);
        f32v v = load_partial(x + i, n) * factor * load_partial(weight + i, n);
        store_partial(out + i, adds ? v + load_partial(out + i, n) : v, n);
    }
}

void run_norm(const Operation *operation, int first, int end)
{
    for (int row = first; row < end; row++)
        norm_row(x_row(operation, row), operation->weight, operation->width, operation->eps,
             out_row(operation, row), operation->accumulate);
    quantize_rows(operation, out_row(operation, first), operation->out_stride, first, end);
}
