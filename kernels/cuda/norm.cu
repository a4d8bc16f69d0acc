/* norm_rows:        out = x / sqrt(mean(x^2) + eps) * weight, as an operand
 * norm_rows_float:  the same in float32; out += if `accumulate`
 * convert_rows:     out = x, as an operand
 *
 *   x       [num_rows, x_stride] float32
 *   out     [num_rows, out_stride] T16, or float32
 *   weight  [width] float32
 * A block a row.  Columns from `width` on are neither read nor written. */
#include "common.cuh"

__device__ __forceinline__ float inverse_rms(const float *x, int width, float eps)
{
    __shared__ float scratch[32];
    float sum = 0.0f;
    for (int i = threadIdx.x; i < width; i += blockDim.x)
        sum += x[i] * x[i];
    return 1.0f / sqrtf(block_sum(sum, scratch) / width + eps);
}

extern "C" __global__ void __launch_bounds__(256) norm_rows(T16 *out, long long out_stride,
    const float *x, long long x_stride, const float *weight, int width, float eps)
{
    out += blockIdx.x * out_stride;
    x += blockIdx.x * x_stride;
    float factor = inverse_rms(x, width, eps);
    for (int i = threadIdx.x; i < width; i += blockDim.x)
        out[i] = to_T16(x[i] * factor * weight[i]);
}

extern "C" __global__ void __launch_bounds__(256) norm_rows_float(float *out, long long out_stride,
    const float *x, long long x_stride, const float *weight, int width, float eps, int accumulate)
{
    out += blockIdx.x * out_stride;
    x += blockIdx.x * x_stride;
    float factor = inverse_rms(x, width, eps);
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float normed = x[i] * factor * weight[i];
        out[i] = accumulate ? out[i] + normed : normed;
    }
}

extern "C" __global__ void __launch_bounds__(256)
    convert_rows(T16 *out, long long out_stride, const float *x, long long x_stride, int width)
{
    out += blockIdx.x * out_stride;
    x += blockIdx.x * x_stride;
    for (int i = threadIdx.x; i < width; i += blockDim.x)
        out[i] = to_T16(x[i]);
}
