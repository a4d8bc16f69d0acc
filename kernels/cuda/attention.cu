/* Attention of rows that decode: out = softmax(cap(q @ K.T * scale)) @ V, split over positions.
 *
 * q             T16 [rows, NUM_HEADS, PADDED_DIM]
 * keys, values  T16 [num_blocks, num_layers, NUM_KV_HEADS, BLOCK_SIZE, PADDED_DIM]
 * out           Out [rows, out_stride]: HEAD_DIM values a head
 * positions     int [rows]; a row attends to the positions up to its own, at most `window` of them
 * sequences     int [rows], an index into block_tables [sequences, *max_blocks]
 * decode_rows   int [n]: the rows to compute
 * first_splits  int [n + 1]: of a row's splits, the index of the first among all rows' splits
 * passes        int2 [passes]: this launch computes decode_rows from x to y - 1
 * partials      float [splits of a pass, HEAD_BLOCKS, GROUP_HEADS, PARTIAL_SIZE]: each head's sum
 *               of weighted values, its largest score and its sum of weights
 * arrivals      int [n, HEAD_BLOCKS], zero between launches
 * Macros besides those of attention.cuh: MAX_SPLITS of a row.
 *
 * blocks_per_split says how many blocks of the cache are a split, by the row's own number of blocks
 * alone; so a row's bits do not depend on the other rows.  The splits of a head group
 * are computed anywhere; the block that finishes the last of them combines all, in order.
 * A grid of any size works: blocks take head groups of splits in turn.  A captured graph thus stays
 * valid while sequences grow.
 *
 * A warp takes one block of the cache at a time, 16 positions, from global memory straight into the
 * fragments of mma, without shared memory: a lane loads 16 bytes, and holds the same 8 dimensions of
 * q.  Scores are q @ K.T, with heads as rows and positions as columns.  A lane has those of row g and
 * columns 2t, 2t + 1, just what the operand of V.T @ weights.T needs.  Half the rows of q are zeros,
 * but tensor cores have time to spare here.  What counts is the number of instructions: dot products
 * on CUDA cores take several times as many, and would not keep up with the memory.
 * Source: Dao et al. 2023, "Flash-Decoding for long-context inference". */
#include "attention.cuh"

#define NUM_WARPS 4
#define NUM_THREADS (NUM_WARPS * 32)
#define K_STEPS ((PADDED_DIM + 31) / 32) /* a lane group of 4 holds 32 values of a position */
#define V_STEPS ((PADDED_DIM + 63) / 64) /* a lane group of 8 holds 64 values of a position */
#define PARTIAL_SIZE (HEAD_DIM + 2)

/* Running softmax of a warp's positions.  The lane's g is its head; it holds sums for heads 2t and
 * 2t + 1, for the values 64 step + 8 g + 2 i and the next:
 *     sums[4 step + i] = value of head 2t, value of head 2t + 1, next of 2t, next of 2t + 1
 * weight_sum is over the lane's own positions only. */
struct Softmax
{
    float sums[4 * V_STEPS][4];
    float largest, weight_sum;
};

/* AttentionKernels of backend/cuda/attention.py counts splits by the same rule. */
__device__ __forceinline__ int blocks_per_split(int num_blocks)
{
    int blocks = NUM_WARPS;
    while (blocks * MAX_SPLITS < num_blocks)
        blocks *= 2;
    return blocks;
}

/* Which row a split belongs to: the last one whose first split is not after it.  A step looks at 32
 * rows. */
__device__ __forceinline__ int row_of_split(const int *first_splits, int first, int end, int split)
{
    const int lane = threadIdx.x % 32;
    while (end - first > 1) {
        const int stride = (end - first + 31) / 32, probe = first + lane * stride;
        const bool is_before = probe < end && first_splits[probe] <= split;
        first += (__popc(__ballot_sync(ALL_LANES, is_before)) - 1) * stride;
        end = min(first + stride, end);
    }
    return first;
}

__device__ __forceinline__ uint4 load_or_zero(const T16 *global, bool is_loaded)
{
    return is_loaded ? load_once(global) : make_uint4(0, 0, 0, 0);
}

__device__ __forceinline__ void load_q(uint4 *q, const T16 *heads, int num_heads)
{
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int step = 0; step < K_STEPS; step++) {
        const int dim = 32 * step + 8 * t;
        q[step] = make_uint4(0, 0, 0, 0);
        if (g < num_heads && dim < PADDED_DIM)
            q[step] = *(const uint4 *)(heads + (long long)g * PADDED_DIM + dim);
    }
}

/* products[h] += q @ K.T of positions 8 h .. 8 h + 7 of the block. */
__device__ __forceinline__ void multiply_keys(float (*products)[4], const uint4 *q, const T16 *keys)
{
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    uint4 k[2][K_STEPS];
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int step = 0; step < K_STEPS; step++) {
            const int dim = 32 * step + 8 * t;
            k[h][step] = load_or_zero(keys + (8 * h + g) * PADDED_DIM + dim, dim < PADDED_DIM);
        }
#pragma unroll
    for (int step = 0; step < K_STEPS; step++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const unsigned q_low[4] = {q[step].x, 0, q[step].y, 0};
            const unsigned q_high[4] = {q[step].z, 0, q[step].w, 0};
            const unsigned k_low[2] = {k[h][step].x, k[h][step].y};
            const unsigned k_high[2] = {k[h][step].z, k[h][step].w};
            mma_m16n8k16<T16>(products[h], q_low, k_low);
            mma_m16n8k16<T16>(products[h], q_high, k_high);
        }
}

/* sums += V.T @ weights.T over the 16 positions of the block; those outside first .. end - 1 may
 * hold anything, NaN included, and are not loaded. */
__device__ __forceinline__ void add_values(
    float (*sums)[4], const unsigned *weights, const T16 *values, int first, int end)
{
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int step = 0; step < V_STEPS; step++) {
        const int dim = 64 * step + 8 * g;
        union { uint4 load; unsigned words[4]; } v[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int position = 2 * t + i % 2 + i / 2 * 8;
            const bool is_loaded = dim < PADDED_DIM && position >= first && position < end;
            v[i].load = load_or_zero(values + position * PADDED_DIM + dim, is_loaded);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const unsigned transposed[4] = {
                __byte_perm(v[0].words[i], v[1].words[i], 0x5410),
                __byte_perm(v[0].words[i], v[1].words[i], 0x7632),
                __byte_perm(v[2].words[i], v[3].words[i], 0x5410),
                __byte_perm(v[2].words[i], v[3].words[i], 0x7632),
            };
            mma_m16n8k16<T16>(sums[4 * step + i], transposed, weights);
        }
    }
}

/* Adds the positions first .. end - 1 of a block of the cache; both are relative to the block. */
__device__ __forceinline__ void attend_block(
    Softmax *softmax, const uint4 *q, const T16 *keys, const T16 *values, int first, int end,
    float scale, float softcap)
{
    const int t = threadIdx.x % 4;
    float products[2][4] = {};
    multiply_keys(products, q, keys);
    float scores[4], largest = softmax->largest;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int position = 2 * t + i % 2 + i / 2 * 8;
        scores[i] = score(products[i / 2][i % 2], scale, softcap);
        if (position < first || position >= end)
            scores[i] = MASKED;
        largest = fmaxf(largest, scores[i]);
    }
    largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 2));

    const float shrink = exp2f(softmax->largest - largest);
    float weights[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        weights[i] = exp2f(scores[i] - largest);
    softmax->largest = largest;
    softmax->weight_sum = softmax->weight_sum * shrink + weights[0] + weights[1] + weights[2]
                          + weights[3];

    const float shrink_even = __shfl_sync(ALL_LANES, shrink, 8 * t);
    const float shrink_odd = __shfl_sync(ALL_LANES, shrink, 8 * t + 4);
#pragma unroll
    for (int i = 0; i < 4 * V_STEPS; i++) {
        softmax->sums[i][0] *= shrink_even;
        softmax->sums[i][1] *= shrink_odd;
        softmax->sums[i][2] *= shrink_even;
        softmax->sums[i][3] *= shrink_odd;
    }
    const unsigned packed[2] = {pack_T16(weights[0], weights[1]), pack_T16(weights[2], weights[3])};
    add_values(softmax->sums, packed, values, first, end);
}

/* The warps' sums of a split, or the splits' shares of a row. */
union Scratch
{
    struct
    {
        float sums[NUM_WARPS][GROUP_HEADS][PADDED_DIM];
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
    for (int i = 0; i < 4 * V_STEPS; i++) {
        const int dim = i / 4 * 64 + 8 * g + 2 * (i % 4);
        if (dim < PADDED_DIM)
#pragma unroll
            for (int j = 0; j < 4; j++)
                if (2 * t + j % 2 < GROUP_HEADS)
                    scratch->warps.sums[warp][2 * t + j % 2][dim + j / 2] = softmax->sums[i][j];
    }
}

/* Merges the warps' sums.  The result goes to `out` if the row has one split, else to `partial`. */
__device__ __forceinline__ void merge_warps(
    const Scratch *scratch, Out *out, float *partial, int num_heads, bool is_only_split)
{
    for (int i = threadIdx.x; i < num_heads * HEAD_DIM; i += NUM_THREADS) {
        const int head = i / HEAD_DIM, dim = i % HEAD_DIM;
        float largest = MASKED, sum = 0.0f, weight_sum = 0.0f;
#pragma unroll
        for (int warp = 0; warp < NUM_WARPS; warp++)
            largest = fmaxf(largest, scratch->warps.largest[warp][head]);
#pragma unroll
        for (int warp = 0; warp < NUM_WARPS; warp++) {
            const float share = exp2f(scratch->warps.largest[warp][head] - largest);
            sum = fmaf(share, scratch->warps.sums[warp][head][dim], sum);
            weight_sum = fmaf(share, scratch->warps.weight_sums[warp][head], weight_sum);
        }
        if (is_only_split) {
            store(out + i, sum / weight_sum);
            continue;
        }
        partial[head * PARTIAL_SIZE + dim] = sum;
        if (dim == 0) {
            partial[head * PARTIAL_SIZE + HEAD_DIM] = largest;
            partial[head * PARTIAL_SIZE + HEAD_DIM + 1] = weight_sum;
        }
    }
}

/* Each split's share of the row, by head: a warp a head, a lane every 32nd split. */
__device__ __forceinline__ void compute_shares(
    Scratch *scratch, const float *partials, int num_heads, int num_splits)
{
    const int lane = threadIdx.x % 32;
    for (int head = threadIdx.x / 32; head < num_heads; head += NUM_WARPS) {
        const float *of_head = partials + head * PARTIAL_SIZE + HEAD_DIM;
        float largest = MASKED, sum = 0.0f;
        for (int split = lane; split < num_splits; split += 32)
            largest = fmaxf(largest, __ldcg(of_head + (long long)split * HEAD_BLOCKS * GROUP_HEADS
                                                          * PARTIAL_SIZE));
        largest = warp_max(largest);
        for (int split = lane; split < num_splits; split += 32) {
            const float *of_split = of_head
                                    + (long long)split * HEAD_BLOCKS * GROUP_HEADS * PARTIAL_SIZE;
            const float share = exp2f(__ldcg(of_split) - largest);
            scratch->shares[head][split] = share;
            sum = fmaf(share, __ldcg(of_split + 1), sum);
        }
        sum = warp_sum(sum);
        for (int split = lane; split < num_splits; split += 32)
            scratch->shares[head][split] /= sum;
    }
}

/* The row's output from the partial results of all its splits. */
__device__ __forceinline__ void combine_splits(
    Scratch *scratch, Out *out, const float *partials, int num_heads, int num_splits)
{
    compute_shares(scratch, partials, num_heads, num_splits);
    __syncthreads();
    for (int i = threadIdx.x; i < num_heads * HEAD_DIM; i += NUM_THREADS) {
        const int head = i / HEAD_DIM;
        const float *partial = partials + head * PARTIAL_SIZE + i % HEAD_DIM;
        float sum = 0.0f;
#pragma unroll 4
        for (int split = 0; split < num_splits; split++) {
            sum = fmaf(scratch->shares[head][split], __ldcg(partial), sum);
            partial += HEAD_BLOCKS * GROUP_HEADS * PARTIAL_SIZE;
        }
        store(out + i, sum);
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
        if (is_last)
            *arrivals = 0;
        __threadfence(); /* and the others' results are read after they arrived */
    }
    __syncthreads();
    return is_last;
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS) decode_attention(
    Out *out, long long out_stride, const T16 *q, const T16 *keys, const T16 *values,
    const int *positions, const int *sequences, const int *block_tables, const int *max_blocks,
    const int *decode_rows, const int *first_splits, const int2 *passes, int pass, float *partials,
    int *arrivals, int layer, int num_layers, float scale, float softcap, int window)
{
    __shared__ Scratch scratch;
    const int2 rows = passes[pass];
    const int splits_before = first_splits[rows.x];
    const int num_units = (first_splits[rows.y] - splits_before) * HEAD_BLOCKS;
    for (int unit = blockIdx.x; unit < num_units; unit += gridDim.x) {
        const int split = unit / HEAD_BLOCKS + splits_before;
        const HeadGroup group = head_group(unit % HEAD_BLOCKS);
        const int index = row_of_split(first_splits, rows.x, rows.y, split);
        const int first_split = first_splits[index];
        const int num_splits = first_splits[index + 1] - first_split;
        const int row = decode_rows[index], position = positions[row];
        const int first = first_attended(position, window), first_block = first / BLOCK_SIZE;
        const int num_blocks = position / BLOCK_SIZE + 1 - first_block;
        const int split_blocks = blocks_per_split(num_blocks);
        const int start = first_block + (split - first_split) * split_blocks;
        const int stop = min(start + split_blocks, first_block + num_blocks);
        const int *table = block_tables + (long long)sequences[row] * *max_blocks;

        uint4 q_values[K_STEPS];
        load_q(q_values, q + ((long long)row * NUM_HEADS + group.first_head) * PADDED_DIM,
               group.num_heads);
        Softmax softmax = {};
        softmax.largest = MASKED;
        for (int block = start + threadIdx.x / 32; block < stop; block += NUM_WARPS) {
            const long long offset = block_offset(table[block], layer, num_layers, group.kv_head);
            attend_block(&softmax, q_values, keys + offset, values + offset,
                         first - block * BLOCK_SIZE, position + 1 - block * BLOCK_SIZE, scale,
                         softcap);
        }
        store_warp(&scratch, &softmax);
        __syncthreads();

        Out *out_heads = out + row * out_stride + group.first_head * HEAD_DIM;
        float *of_split = partials
                          + (long long)unit * GROUP_HEADS * PARTIAL_SIZE;
        merge_warps(&scratch, out_heads, of_split, group.num_heads, num_splits == 1);
        if (num_splits > 1
            && is_last_split(arrivals + index * HEAD_BLOCKS + unit % HEAD_BLOCKS, num_splits)) {
            const float *of_row = of_split - (long long)(split - first_split) * HEAD_BLOCKS
                                                 * GROUP_HEADS * PARTIAL_SIZE;
            combine_splits(&scratch, out_heads, of_row, group.num_heads, num_splits);
        }
        __syncthreads(); /* before the next unit overwrites scratch */
    }
}
