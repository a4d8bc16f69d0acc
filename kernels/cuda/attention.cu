/* Attention of rows that decode: out = softmax(cap(q @ K.T * scale)) @ V, split over positions.
 *
 * q             T16 [rows, NUM_HEADS, PADDED_DIM]
 * keys, values  T16 [num_blocks, num_layers, NUM_KV_HEADS, BLOCK_SIZE, PADDED_DIM]
 * out           Out [rows, out_stride]: HEAD_DIM values a head
 * block_tables  int [sequences, *max_blocks]
 * rows          DecodeRow [n]: the rows to compute
 * passes        int4 [passes]: this launch computes rows x .. y - 1, with splits z .. w - 1
 * partials      float [splits of a pass, NUM_GROUPS, PARTIAL_SIZE]: HEAD_DIM sums of weighted
 *               values for each head, then the heads' largest scores, then their sums of weights
 * arrivals      int [n, NUM_GROUPS], zero between launches
 * Macros besides those of attention_merge.cuh: RESIDENT_BLOCKS on a multiprocessor,
 * which bounds the registers of a thread.
 *
 * A row attends to the positions up to its own, at most `window` of them.  A split is a number of
 * blocks of the cache, blocks_per_split, which depends on the row's own number of blocks alone; so
 * a row's bits do not depend on the other rows.  The block that finishes the last split of a row
 * combines all of them, in order.  The grid may have any size, best the number of blocks that are
 * resident: they take the groups of heads of all splits in turn.  So a captured graph stays valid
 * while sequences grow.
 *
 * A warp takes one block of the cache at a time, 16 positions, from global memory straight into the
 * fragments of mma, without shared memory: a lane loads 16 bytes, and holds the same 8 dimensions
 * of q.  Scores are q @ K.T, with heads as rows and positions as columns.  A lane has those of row
 * g and columns 2t, 2t + 1, just what the operand of V.T @ weights.T needs.  Half the rows of q are
 * zeros, but tensor cores have time to spare here.  What counts is the number of instructions: dot
 * products on CUDA cores take several times as many, and would not keep up with the memory.
 * Source: Dao et al. 2023, "Flash-Decoding for long-context inference". */
#include "attention_merge.cuh"

/* Whether the next block's keys and values are loaded as soon as this one's registers are free.
 * Large heads take too many registers for that, but have more loads under way. */
#define LOADS_AHEAD (PADDED_DIM <= 128)
#define K_STEPS ((PADDED_DIM + 31) / 32) /* 4 lanes hold 32 values of a position */

/* A row, its sequence, and its splits among those of all rows. */
struct __align__(16) DecodeRow
{
    int row, sequence, position, first_split, num_splits, unused[3];
};

/* The keys and values of a block of the cache, as a lane loads them. */
struct Keys
{
    uint4 halves[2][K_STEPS]; /* positions g and 8 + g, dimensions 32 step + 8 t .. */
};
struct Values
{
    uint4 positions[V_STEPS][4]; /* 2t, 2t + 1, 2t + 8, 2t + 9; dimensions 64 step + 8 g .. */
};

/* AttentionWork of backend/cuda/attention_work.py counts splits by the same rule. */
__device__ __forceinline__ int blocks_per_split(int num_blocks)
{
    int blocks = NUM_WARPS;
    while (blocks * MAX_SPLITS < num_blocks)
        blocks *= 2;
    return blocks;
}

/* Which row a split belongs to: the last one whose first split is not after it.  A step looks at 32
 * rows. */
__device__ __forceinline__ int row_of_split(const DecodeRow *rows, int first, int end, int split)
{
    const int lane = threadIdx.x % 32;
    while (end - first > 1) {
        const int stride = (end - first + 31) / 32, probe = first + lane * stride;
        const bool is_before = probe < end && rows[probe].first_split <= split;
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
            q[step] = *(const uint4 *)(heads + g * PADDED_DIM + dim);
    }
}

__device__ __forceinline__ void load_keys(Keys *k, const T16 *keys)
{
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int step = 0; step < K_STEPS; step++) {
            const int dim = 32 * step + 8 * t;
            k->halves[half][step] = load_or_zero(keys + (8 * half + g) * PADDED_DIM + dim,
                                                 dim < PADDED_DIM);
        }
}

/* Positions outside first .. end - 1 may hold anything, NaN included: they become zeros. */
__device__ __forceinline__ void load_values(Values *v, const T16 *values, int first, int end)
{
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int step = 0; step < V_STEPS; step++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int dim = 64 * step + 8 * g, position = 2 * t + i % 2 + i / 2 * 8;
            const bool is_loaded = dim < PADDED_DIM && position >= first && position < end;
            v->positions[step][i] = load_or_zero(values + position * PADDED_DIM + dim, is_loaded);
        }
}

/* products[half] = q @ K.T of positions 8 half .. 8 half + 7. */
__device__ __forceinline__ void multiply_keys(float (*products)[4], const uint4 *q, const Keys *k)
{
#pragma unroll
    for (int step = 0; step < K_STEPS; step++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint4 k_step = k->halves[half][step];
            const unsigned q_low[4] = {q[step].x, 0, q[step].y, 0};
            const unsigned q_high[4] = {q[step].z, 0, q[step].w, 0};
            const unsigned k_low[2] = {k_step.x, k_step.y}, k_high[2] = {k_step.z, k_step.w};
            mma_m16n8k16<T16>(products[half], q_low, k_low);
            mma_m16n8k16<T16>(products[half], q_high, k_high);
        }
}

/* Turns the products of positions first .. end - 1 into weights, and the sums to the new largest
 * score. */
__device__ __forceinline__ void weigh(Softmax *softmax, float *weights, float (*products)[4],
                                      int first, int end, float scale, float softcap)
{
    const int t = threadIdx.x % 4;
    float largest = softmax->largest;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int position = 2 * t + i % 2 + i / 2 * 8;
        weights[i] = capped(products[i / 2][i % 2], scale, softcap);
        if (position < first || position >= end)
            weights[i] = MASKED;
        largest = fmaxf(largest, weights[i]);
    }
    largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 2));
    const float unit = score_scale(scale), shrink = exp2f((softmax->largest - largest) * unit);
    float weight_sum = softmax->weight_sum * shrink;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        weights[i] = exp2f((weights[i] - largest) * unit);
        weight_sum += weights[i];
    }
    softmax->largest = largest;
    softmax->weight_sum = weight_sum;

    const float shrink_even = __shfl_sync(ALL_LANES, shrink, 8 * t);
    const float shrink_odd = __shfl_sync(ALL_LANES, shrink, 8 * t + 4);
#pragma unroll
    for (int i = 0; i < 4 * V_STEPS; i++) {
        softmax->sums[i][0] *= shrink_even;
        softmax->sums[i][1] *= shrink_odd;
        softmax->sums[i][2] *= shrink_even;
        softmax->sums[i][3] *= shrink_odd;
    }
}

/* sums += V.T @ weights.T over the block's 16 positions. */
__device__ __forceinline__ void add_values(Softmax *softmax, const float *weights, const Values *v)
{
    const unsigned packed[2] = {pack_weights(weights[0], weights[1]),
                                pack_weights(weights[2], weights[3])};
#pragma unroll
    for (int step = 0; step < V_STEPS; step++) {
        const unsigned *words[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            words[i] = &v->positions[step][i].x;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const unsigned transposed[4] = {
                __byte_perm(words[0][i], words[1][i], 0x5410),
                __byte_perm(words[0][i], words[1][i], 0x7632),
                __byte_perm(words[2][i], words[3][i], 0x5410),
                __byte_perm(words[2][i], words[3][i], 0x7632),
            };
            mma_m16n8k16<T16>(softmax->sums[4 * step + i], transposed, packed);
        }
    }
}

/* Attends to positions first .. end - 1 in the warp's blocks of start .. stop - 1. */
__device__ __forceinline__ void attend(Softmax *softmax, const uint4 *q, const T16 *keys,
                                       const T16 *values, const int *table, int start, int stop,
                                       int first, int end, int layer, int num_layers, int kv_head,
                                       float scale, float softcap)
{
    Keys k;
    Values v;
    long long offset;
    const int first_block = start + threadIdx.x / 32;
    if (LOADS_AHEAD && first_block < stop) {
        offset = block_offset(table[first_block], layer, num_layers, kv_head);
        load_keys(&k, keys + offset);
        load_values(&v, values + offset, first - first_block * BLOCK_SIZE,
                    end - first_block * BLOCK_SIZE);
    }
    for (int block = first_block; block < stop; block += NUM_WARPS) {
        const int next = block + NUM_WARPS, base = block * BLOCK_SIZE;
        if (!LOADS_AHEAD) {
            offset = block_offset(table[block], layer, num_layers, kv_head);
            load_keys(&k, keys + offset);
            load_values(&v, values + offset, first - base, end - base);
        }
        float products[2][4] = {}, weights[4];
        multiply_keys(products, q, &k);
        if (LOADS_AHEAD && next < stop) {
            offset = block_offset(table[next], layer, num_layers, kv_head);
            load_keys(&k, keys + offset);
        }
        weigh(softmax, weights, products, first - base, end - base, scale, softcap);
        add_values(softmax, weights, &v);
        if (LOADS_AHEAD && next < stop)
            load_values(&v, values + offset, first - next * BLOCK_SIZE, end - next * BLOCK_SIZE);
    }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, RESIDENT_BLOCKS) decode_attention(
    Out *out, long long out_stride, const T16 *q, const T16 *keys, const T16 *values,
    const int *block_tables, const int *max_blocks, const DecodeRow *rows, const int4 *passes,
    int pass_index, float *partials, int *arrivals, int layer, int num_layers, float scale,
    float softcap, int window)
{
    __shared__ Scratch scratch;
    const int4 pass = passes[pass_index];
    const int num_units = (pass.w - pass.z) * NUM_GROUPS, table_stride = *max_blocks;
    for (int unit = blockIdx.x; unit < num_units; unit += gridDim.x) {
        const int index = row_of_split(rows, pass.x, pass.y, pass.z + unit / NUM_GROUPS);
        const DecodeRow row = rows[index];
        const HeadGroup group = head_group(unit % NUM_GROUPS);
        const int split = pass.z + unit / NUM_GROUPS - row.first_split;
        const int first = first_attended(row.position, window), first_block = first / BLOCK_SIZE;
        const int end_block = row.position / BLOCK_SIZE + 1;
        const int split_blocks = blocks_per_split(end_block - first_block);
        const int start = first_block + split * split_blocks;
        uint4 q_heads[K_STEPS];
        load_q(q_heads, q + ((long long)row.row * NUM_HEADS + group.first_head) * PADDED_DIM,
               group.num_heads);
        Softmax softmax = {};
        softmax.largest = MASKED;
        attend(&softmax, q_heads, keys, values,
               block_tables + (long long)row.sequence * table_stride, start,
               min(start + split_blocks, end_block), first, row.position + 1, layer, num_layers,
               group.kv_head, scale, softcap);
        store_warp(&scratch, &softmax);
        __syncthreads();

        const float unit_scale = score_scale(scale);
        Out *out_heads = out + row.row * out_stride + group.first_head * HEAD_DIM;
        float *partial = partials + (long long)unit * PARTIAL_SIZE;
        merge_warps(&scratch, out_heads, partial, group.num_heads, row.num_splits == 1, unit_scale);
        if (row.num_splits > 1
            && is_last_split(arrivals + index * NUM_GROUPS + unit % NUM_GROUPS, row.num_splits)) {
            const float *of_row = partial - (long long)split * NUM_GROUPS * PARTIAL_SIZE;
            combine_splits(&scratch, out_heads, of_row, group.num_heads, row.num_splits,
                           unit_scale);
        }
        __syncthreads(); /* before the next unit overwrites scratch */
    }
}
