/* ROPE_AND_STORE: q = rotate(norm(q)), and k = rotate(norm(k)) and v into the paged KV cache.
 *
 * qkv        float32 [rows, qkv_stride]: NUM_HEADS q heads, NUM_KV_HEADS k heads and as many v
 *            heads of HEAD_DIM values; it stays as it is
 * q          T16 [rows, NUM_HEADS, PADDED_DIM]
 * keys       T16 [num_blocks, num_layers, NUM_KV_HEADS, 16, PADDED_DIM]; values alike
 * positions  int [rows]
 * sequences  int [rows], an index into is_long
 * slots      int64 [rows]: block * 16 + offset, where the row's k and v go
 * is_long    int [sequences]: whether long_frequencies apply; read only if they are not null
 * frequencies  float32 [half_rotary_dim], in radians a position; half_rotary_dim 0: no rotation
 * q_norm     float32 [HEAD_DIM], or [NUM_HEADS * HEAD_DIM] if norms_across & 1; null: no norm
 * k_norm     float32 [HEAD_DIM], or [NUM_KV_HEADS * HEAD_DIM] if norms_across & 2; null: no norm
 *
 * Values from HEAD_DIM to PADDED_DIM are written as zeros.  HEAD_DIM is a multiple of 4, PADDED_DIM
 * the next multiple of 16.  Grid (blocks, rows), NUM_WARPS warps.  A warp takes a head at a time, a
 * lane pairs of values that rotate together.  With norms across heads, a row has a single block.
 * Source: Su et al. 2021, section 3.4. */
#include "common.cuh"

#define BLOCK_SIZE 16
#define NUM_WARPS 8
#define NUM_ROTATED (NUM_HEADS + NUM_KV_HEADS)
#define NUM_ALL (NUM_ROTATED + NUM_KV_HEADS)
#define PAIRS ((PADDED_DIM / 2 + 31) / 32) /* of a lane */

/* Where pair i of a head is.  Those after the rotated ones are neighbours. */
__device__ __forceinline__ int2 pair_at(int i, int half, int is_interleaved)
{
    return is_interleaved || i >= half ? make_int2(2 * i, 2 * i + 1) : make_int2(i, i + half);
}

/* Cosine and sine of 0 <= angle <= 1e6, to 1.1e-7; to 3e-6 up to 4e6.  A multiple of pi / 2 is
 * subtracted in three steps.  The first is exact: fmaf does not round the product, and the
 * difference is a multiple of 2^-23 smaller than 1.  sinf is as exact, but reduces large angles
 * through local memory.
 * Source: Cody & Waite 1980; the polynomials are those of Cephes, sinf.c. */
__device__ __forceinline__ float2 cos_sin(float angle)
{
    float quarter = rintf(angle * 0.636619772f);
    float x = fmaf(quarter, -1.57079625f, angle);
    x = fmaf(quarter, -7.54978942e-8f, x);
    x = fmaf(quarter, -5.39030253e-15f, x);
    float square = x * x;
    float sine = fmaf(square, -1.9515295891e-4f, 8.3321608736e-3f);
    sine = fmaf(fmaf(square, sine, -1.6666654611e-1f) * square, x, x);
    float cosine = fmaf(square, 2.443315711809948e-5f, -1.388731625493765e-3f);
    cosine = fmaf(square, cosine, 4.166664568298827e-2f);
    cosine = fmaf(square * square, cosine, fmaf(square, -0.5f, 1.0f));
    int quadrant = (int)quarter & 3;
    float2 turned = quadrant & 1 ? make_float2(-sine, cosine) : make_float2(cosine, sine);
    return quadrant & 2 ? make_float2(-turned.x, -turned.y) : turned;
}

/* 1 / sqrt(mean(x^2) + eps) over all values of a row's heads. */
__device__ float norm_across(const float *x, int count, float eps, float *scratch)
{
    float sum = 0.0f;
    for (int i = threadIdx.x; i < count; i += NUM_WARPS * 32)
        sum = fmaf(x[i], x[i], sum);
    return 1.0f / sqrtf(block_sum(sum, scratch) / count + eps);
}

/* Scales a head by its norm and the norm's weights. */
__device__ __forceinline__ void scale_head(float2 *x, float norm, const float *weight, int lane,
                                           int half, int is_interleaved)
{
#pragma unroll
    for (int j = 0; j < PAIRS; j++) {
        int2 at = pair_at(lane + 32 * j, half, is_interleaved);
        if (lane + 32 * j < HEAD_DIM / 2)
            x[j] = make_float2(x[j].x * norm * weight[at.x], x[j].y * norm * weight[at.y]);
    }
}

extern "C" __global__ void __launch_bounds__(256) rope_and_store(
    const float *qkv, long long qkv_stride, T16 *q, T16 *keys, T16 *values, const int *positions,
    const int *sequences, const long long *slots, const int *is_long, const float *frequencies,
    const float *long_frequencies, int half_rotary_dim, int is_interleaved, float magnitude,
    const float *q_norm, const float *k_norm, int norms_across, float eps, int layer,
    int num_layers)
{
    __shared__ float scratch[32];
    const int row = blockIdx.y, lane = threadIdx.x % 32, half = half_rotary_dim;
    const float *x = qkv + row * qkv_stride;
    const long long slot = slots[row];
    const long long first_head = (slot / BLOCK_SIZE * num_layers + layer) * NUM_KV_HEADS;
    const float position = (float)positions[row];
    if (long_frequencies && is_long[sequences[row]])
        frequencies = long_frequencies;
    float2 turns[PAIRS];
#pragma unroll
    for (int j = 0; j < PAIRS; j++) {
        turns[j] = make_float2(0.0f, 0.0f);
        if (lane + 32 * j < half)
            turns[j] = cos_sin(position * frequencies[lane + 32 * j]);
        turns[j] = make_float2(turns[j].x * magnitude, turns[j].y * magnitude);
    }
    float q_scale = 0.0f, k_scale = 0.0f;
    if (norms_across & 1)
        q_scale = norm_across(x, NUM_HEADS * HEAD_DIM, eps, scratch);
    if (norms_across & 2)
        k_scale = norm_across(x + NUM_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM, eps, scratch);

    for (int head = blockIdx.x * NUM_WARPS + threadIdx.x / 32; head < NUM_ALL;
         head += gridDim.x * NUM_WARPS) {
        float2 pairs[PAIRS];
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < PAIRS; j++) {
            const int i = lane + 32 * j;
            const int2 at = pair_at(i, half, is_interleaved);
            pairs[j] = make_float2(0.0f, 0.0f);
            if (i < HEAD_DIM / 2)
                pairs[j] = make_float2(x[head * HEAD_DIM + at.x], x[head * HEAD_DIM + at.y]);
            sum = fmaf(pairs[j].x, pairs[j].x, fmaf(pairs[j].y, pairs[j].y, sum));
        }

        const bool is_q = head < NUM_HEADS, is_k = !is_q && head < NUM_ROTATED;
        const float *weight = is_q ? q_norm : is_k ? k_norm : nullptr;
        if (weight) {
            float norm = 1.0f / sqrtf(warp_sum(sum) / HEAD_DIM + eps);
            if (norms_across & (is_q ? 1 : 2)) {
                norm = is_q ? q_scale : k_scale;
                weight += (is_q ? head : head - NUM_HEADS) * HEAD_DIM;
            }
            scale_head(pairs, norm, weight, lane, half, is_interleaved);
        }

        const long long kv_head = first_head + (head - NUM_HEADS) % NUM_KV_HEADS;
        T16 *out = is_k ? keys : values;
        out += (kv_head * BLOCK_SIZE + slot % BLOCK_SIZE) * PADDED_DIM;
        if (is_q)
            out = q + ((long long)row * NUM_HEADS + head) * PADDED_DIM;
#pragma unroll
        for (int j = 0; j < PAIRS; j++) {
            const int i = lane + 32 * j;
            if (i >= PADDED_DIM / 2)
                continue;
            const int2 at = pair_at(i, half, is_interleaved);
            float2 pair = pairs[j];
            if (i < half && (is_q || is_k))
                pair = make_float2(pairs[j].x * turns[j].x - pairs[j].y * turns[j].y,
                                   pairs[j].y * turns[j].x + pairs[j].x * turns[j].y);
            out[at.x] = to_T16(pair.x);
            out[at.y] = to_T16(pair.y);
        }
    }
}
