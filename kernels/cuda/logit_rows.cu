/* SELECT_LOGIT_ROWS: out[r] = x[logit_rows[r]].
 * POOL: out[r] = the mean of x from row first_rows[r] to logit_rows[r]; pooling by the last row is
 * SELECT_LOGIT_ROWS.
 * SOFTCAP: x = cap * tanh(x / cap), in place.
 *
 * x    float32 [rows, x_stride], `width` values a row
 * out  Out [logit rows, out_stride]; the values from `width` to out_stride are written as zeros
 * Grid (columns / blockDim.x rounded up, logit rows). */
#include "output.cuh"

__device__ __forceinline__ void store_mean(Out *out, long long out_stride, const float *x,
                                           long long x_stride, int width, int first, int last)
{
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= out_stride)
        return;
    float sum = 0.0f;
    if (column < width)
        for (int row = first; row <= last; row++)
            sum += x[row * x_stride + column];
    store(out + blockIdx.y * out_stride + column, first == last ? sum : sum / (last + 1 - first));
}

extern "C" __global__ void select_rows(Out *out, long long out_stride, const float *x,
                                       long long x_stride, int width, const int *logit_rows)
{
    const int row = logit_rows[blockIdx.y];
    store_mean(out, out_stride, x, x_stride, width, row, row);
}

extern "C" __global__ void pool_mean(Out *out, long long out_stride, const float *x,
                                     long long x_stride, int width, const int *first_rows,
                                     const int *logit_rows)
{
    store_mean(out, out_stride, x, x_stride, width, first_rows[blockIdx.y], logit_rows[blockIdx.y]);
}

extern "C" __global__ void softcap(float *x, long long stride, int width, float cap)
{
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= width)
        return;
    float *value = x + blockIdx.y * stride + column;
    *value = cap * tanhf(*value / cap);
}
