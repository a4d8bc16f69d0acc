#include "activation.h"
#include "rows.h"

void run_activate(const Operation *operation, int first, int end)
{
    int width = operation->width;
    for (int row = first; row < end; row++) {
        const float *gate = x_row(operation, row), *up = gate + width;
        float *out = out_row(operation, row);
        FOR_VECTORS(i, width) {
            int n = lanes_left(width, i);
            f32v v = activate(load_partial(gate + i, n), operation->option);
            store_partial(out + i, v * load_partial(up + i, n), n);
        }
    }
    quantize_rows(operation, out_row(operation, first), operation->out_stride, first, end);
}
