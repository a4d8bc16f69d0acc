/* Results of decode attention, from a warp's to a row's: the warps of a block merge theirs into a
 * partial result, and the last block of a row combines the partial results of all its splits.
 *
 * Macros besides those of attention.cuh: MAX_SPLITS of a row. */
#include "attention.cuh"

#define NUM_WARPS 4
#define NUM_THREADS (NUM_WARPS * 32)
#define V_STEPS ((PADDED_DIM + 63) / 64) /* 8 lanes hold 64 values of a position */
#define GROUP_DIM (GROUP_HEADS * HEAD_DIM)
#define PARTIAL_SIZE ((GROUP_DIM + 2 * GROUP_HEADS + 3) / 4 * 4)
#define SPLITS_PER_LANE ((MAX_SPLITS + 31) / 32)

/* Running softmax of a warp's positions, in units of score_scale.  The lane's g is its head; it has
 * the sums of heads 2t and 2t + 1, for the values 64 step + 8 g + 2 i and the next:
 *     sums[4 step + i] = value of head 2t, value of head 2t + 1, next of 2t, next of 2t + 1
 * weight_sum is over the lane's own positions only. */
struct Softmax
{
    float sums[4 * V_STEPS][4];
    float largest, weight_sum;
};

/* The warps' results of a split; or the splits' shares of a row, by head. */
union Scratch
{
    struct
    {
        float4 sums[NUM_WARPS][GROUP_HEADS][PADDED_DIM / 4];
        float largest[NUM_WARPS][8], weight_sums[NUM_WARPS][8];
    } warps;
    float shares[GROUP_HEADS][MAX_SPLITS];
};

__device__ __forceinline__ void store_warp(Scratch *scratch, const Softmax *softmax)
{
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float weight_sum = softmax->weight_sum;
    weight_sum += __shfl_xor_sync(ALL_LANES, weight_sum, 1);
    weight_sum += __shfl_xor_sync(ALL_LANES, weight_sum, 2);
    if (t == 0) {
        scratch->warps.largest[warp][g] = softmax->largest;
        scratch->warps.weight_sums[warp][g] = weight_sum;
    }
#pragma unroll
    for (int step = 0; step < V_STEPS; step++)
#pragma unroll
        for (int odd = 0; odd < 2; odd++) {
            const int at = 16 * step + 2 * g, head = 2 * t + odd;
            const float(*sums)[4] = &softmax->sums[4 * step];
            if (head >= GROUP_HEADS || 4 * at >= PADDED_DIM)
                continue;
            scratch->warps.sums[warp][head][at] = make_float4(
                sums[0][odd], sums[0][2 + odd], sums[1][odd], sums[1][2 + odd]);
            scratch->warps.sums[warp][head][at + 1] = make_float4(
                sums[2][odd], sums[2][2 + odd], sums[3][odd], sums[3][2 + odd]);
        }
}

__device__ __forceinline__ void add_scaled(float4 *sum, float share, float4 values)
{
    sum->x = fmaf(share, values.x, sum->x);
    sum->y = fmaf(share, values.y, sum->y);
    sum->z = fmaf(share, values.z, sum->z);
    sum->w = fmaf(share, values.w, sum->w);
}

__device__ __forceinline__ void store_row(Out *out, float4 sum, float share)
{
    store_pair(out, sum.x * share, sum.y * share);
    store_pair(out + 2, sum.z * share, sum.w * share);
}

/* Merges the warps' results.  The result goes to `out` if the row has one split, else to `partial`.
 */
__device__ __forceinline__ void merge_warps(const Scratch *scratch, Out *out, float *partial,
                                            int num_heads, bool is_only_split, float unit)
{
    for (int i = threadIdx.x; i < num_heads * HEAD_DIM / 4; i += NUM_THREADS) {
        const int head = i / (HEAD_DIM / 4), at = i % (HEAD_DIM / 4);
        float largest = MASKED, weight_sum = 0.0f;
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int warp = 0; warp < NUM_WARPS; warp++)
            largest = fmaxf(largest, scratch->warps.largest[warp][head]);
#pragma unroll
        for (int warp = 0; warp < NUM_WARPS; warp++) {
            const float share = exp2f((scratch->warps.largest[warp][head] - largest) * unit);
            add_scaled(&sum, share, scratch->warps.sums[warp][head][at]);
            weight_sum = fmaf(share, scratch->warps.weight_sums[warp][head], weight_sum);
        }
        if (is_only_split) {
            store_row(out + 4 * i, sum, 1.0f / weight_sum);
            continue;
        }
        ((float4 *)partial)[i] = sum;
        if (at == 0) {
            partial[GROUP_DIM + head] = largest;
            partial[GROUP_DIM + GROUP_HEADS + head] = weight_sum;
        }
    }
}

/* Whether this block is the last of the row's splits to arrive. */
__device__ __forceinline__ bool is_last_split(int *arrivals, int num_splits)
{
    __shared__ int is_last;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence(); /* the block's partial result is visible before it arrives */
        is_last = atomicAdd(arrivals, 1) == num_splits - 1;
        __threadfence(); /* and the others' results are read after they arrived */
        if (is_last)
            *arrivals = 0;
    }
    __syncthreads();
    return is_last;
}

/* Each split's share of the row, by head: a warp a head, a lane every 32nd split. */
__device__ __forceinline__ void compute_shares(
    Scratch *scratch, const float *partials, int num_heads, int num_splits, float unit)
{
    const int lane = threadIdx.x % 32;
    for (int head = threadIdx.x / 32; head < num_heads; head += NUM_WARPS) {
        float scores[SPLITS_PER_LANE], sums[SPLITS_PER_LANE], largest = MASKED, sum = 0.0f;
#pragma unroll
        for (int i = 0; i < SPLITS_PER_LANE; i++) {
            scores[i] = MASKED;
            sums[i] = 0.0f;
            if (lane + 32 * i >= num_splits)
                continue;
            const float *partial = partials
                                   + (long long)(lane + 32 * i) * NUM_GROUPS * PARTIAL_SIZE
                                   + GROUP_DIM + head;
            scores[i] = __ldcg(partial);
            sums[i] = __ldcg(partial + GROUP_HEADS);
            largest = fmaxf(largest, scores[i]);
        }
        largest = warp_max(largest);
#pragma unroll
        for (int i = 0; i < SPLITS_PER_LANE; i++) {
            scores[i] = exp2f((scores[i] - largest) * unit);
            sum = fmaf(scores[i], sums[i], sum);
        }
        sum = 1.0f / warp_sum(sum);
#pragma unroll
        for (int i = 0; i < SPLITS_PER_LANE; i++)
            if (lane + 32 * i < num_splits)
                scratch->shares[head][lane + 32 * i] = scores[i] * sum;
    }
}

/* The row's output from the partial results of all its splits. */
__device__ __forceinline__ void combine_splits(
    Scratch *scratch, Out *out, const float *partials, int num_heads, int num_splits, float unit)
{
    compute_shares(scratch, partials, num_heads, num_splits, unit);
    __syncthreads();
    for (int i = threadIdx.x; i < num_heads * HEAD_DIM / 4; i += NUM_THREADS) {
        const float *shares = scratch->shares[i / (HEAD_DIM / 4)];
        const float *partial = partials + 4 * i;
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
        for (int split = 0; split < num_splits; split++) {
            add_scaled(&sum, shares[split], __ldcg((const float4 *)partial));
            partial += NUM_GROUPS * PARTIAL_SIZE;
        }
        store_row(out + 4 * i, sum, 1.0f);
    }
}
