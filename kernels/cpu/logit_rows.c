#include "logit_rows.h"
#include "rows.h"

void run_select(const Plan *plan, const Operation *operation, int first, int end)
{
    for (int row = first; row < end; row++)
        memcpy(out_row(operation, row), x_row(operation, plan->batch.logit_rows[row]),
               sizeof(float) * (size_t)operation->width);
    quantize_rows(operation, out_row(operation, first), operation->out_stride, first, end);
}

void run_pool(const Plan *plan, const Operation *operation, int first, int end)
{
    const Batch *batch = &plan->batch;
    for (int row = first; row < end; row++) {
        int last = batch->logit_rows[row], begin = last;
        if (operation->option)
            while (begin > 0 && batch->sequences[begin - 1] == batch->sequences[last])
                begin--;
        float *out = out_row(operation, row);
        for (int i = 0; i < operation->width; i++) {
            float total = 0;
            for (int r = begin; r <= last; r++)
                total += x_row(operation, r)[i];
            out[i] = total / (float)(last - begin + 1);
        }
    }
    quantize_rows(operation, out_row(operation, first), operation->out_stride, first, end);
}

void run_softcap(const Operation *operation, int first, int end)
{
    for (int row = first; row < end; row++) {
        float *out = out_row(operation, row);
        FOR_VECTORS(i, operation->width) {
            int n = lanes_left(operation->width, i);
            f32v v = load_partial(out + i, n) / splat(operation->softcap);
            store_partial(out + i, splat(operation->softcap) * tanh_v(v), n);
        }
    }
}
