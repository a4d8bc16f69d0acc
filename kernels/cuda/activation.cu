/* GATED_ACTIVATION: out = f(gate) * up; f is silu, or gelu by tanh.
 *
 * x     float32 [rows, x_stride]: `width` gate values, then `width` up values
 * out   Out [rows, out_stride]; the values from `width` to out_stride are written as zeros
 * Grid (out_stride / blockDim.x rounded up, rows).
 * Source of gelu: Hendrycks & Gimpel 2016, section 2. */
#include "output.cuh"

__device__ __forceinline__ float silu(float x)
{
    return x / (1.0f + expf(-x));
}

__device__ __forceinline__ float gelu(float x)
{
    return 0.5f * x * (1.0f + tanhf(0.797884561f * (x + 0.044715f * x * x * x)));
}

extern "C" __global__ void gated_activation(
    Out *out, long long out_stride, const float *x, long long x_stride, int width, int is_gelu)
{
    const long long row = blockIdx.y;
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= out_stride)
        return;
    float value = 0.0f;
    if (column < width) {
        const float gate = x[row * x_stride + column], up = x[row * x_stride + width + column];
        value = (is_gelu ? gelu(gate) : silu(gate)) * up;
    }
    store(out + row * out_stride + column, value);
}
