/* Stores to an output, which is T16, or float32 with the macro FLOAT_OUT. */
#include "common.cuh"

#ifdef FLOAT_OUT
typedef float Out;
#else
typedef T16 Out;
#endif

__device__ __forceinline__ void store(float *out, float value)
{
    *out = value;
}

__device__ __forceinline__ void store(T16 *out, float value)
{
    *out = to_T16(value);
}

/* Two values; the first at a multiple of two values. */
__device__ __forceinline__ void store_pair(float *out, float first, float second)
{
    *(float2 *)out = make_float2(first, second);
}

__device__ __forceinline__ void store_pair(T16 *out, float first, float second)
{
    *(unsigned *)out = pack_T16(first, second);
}
