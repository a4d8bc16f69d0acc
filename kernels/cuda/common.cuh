/* The 16-bit type of operands, conversions, and reductions over a warp or a block. */
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#ifdef BFLOAT16
typedef __nv_bfloat16 T16;
typedef __nv_bfloat162 T16x2;
__device__ __forceinline__ float to_float(T16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float2 to_float2(T16x2 pair) { return __bfloat1622float2(pair); }
__device__ __forceinline__ T16 to_T16(float value) { return __float2bfloat16_rn(value); }
#else
typedef __half T16;
typedef __half2 T16x2;
__device__ __forceinline__ float to_float(T16 value) { return __half2float(value); }
__device__ __forceinline__ float2 to_float2(T16x2 pair) { return __half22float2(pair); }

/* Saturates: an infinity would turn a whole sequence to NaN.  NaN stays NaN. */
__device__ __forceinline__ T16 to_T16(float value)
{
    if (value > 65504.0f)
        value = 65504.0f;
    if (value < -65504.0f)
        value = -65504.0f;
    return __float2half_rn(value);
}
#endif

#define ALL_LANES 0xffffffffu

/* Two T16 in a register; the first in the low half. */
__device__ __forceinline__ unsigned pack_T16(float first, float second)
{
    union { T16 values[2]; unsigned bits; } pair;
    pair.values[0] = to_T16(first);
    pair.values[1] = to_T16(second);
    return pair.bits;
}

__device__ __forceinline__ float2 unpack_T16(unsigned bits)
{
    union { unsigned bits; T16x2 values; } pair;
    pair.bits = bits;
    return to_float2(pair.values);
}

template <class T> __device__ __forceinline__ T warp_sum(T value)
{
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
        value += __shfl_xor_sync(ALL_LANES, value, offset);
    return value;
}

__device__ __forceinline__ float warp_max(float value)
{
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
        value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, offset));
    return value;
}

/* The sum over all threads of the block, in every thread.  `scratch` is shared memory for 32
 * values, free again on return.  The block has whole warps. */
template <class T> __device__ __forceinline__ T block_sum(T value, T *scratch)
{
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    value = warp_sum(value);
    if (lane == 0)
        scratch[warp] = value;
    __syncthreads();
    value = warp_sum(lane < blockDim.x / 32 ? scratch[lane] : T(0));
    __syncthreads();
    return value;
}
