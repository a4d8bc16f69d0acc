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
 * Macros besides those of attention.cuh: MAX_SPLITS of a row; RESIDENT_BLOCKS on a multiprocessor,
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
#include "attention.cuh"

#define NUM_WARPS 4
#define NUM_THREADS (NUM_WARPS * 32)
/* Whether the next block's keys and values are loaded as soon as this one's registers are free.
 * Large heads take too many registers for that, but have more loads under way. */
#define LOADS_AHEAD (PADDED_DIM <= 128)
#define K_STEPS ((PADDED_DIM + 31) / 32) /* 4 lanes hold 32 values of a position */
#define V_STEPS ((PADDED_DIM + 63) / 64) /* 8 lanes hold 64 values of a position */
#define GROUP_DIM (GROUP_HEADS * HEAD_DIM)
#define PARTIAL_SIZE ((GROUP_DIM + 2 * GROUP_HEADS + 3) / 4 * 4)
#define SPLITS_PER_LANE ((MAX_SPLITS + 31) / 32)

/* A row, its sequence, and its splits among those of all rows. */
struct __align__(16) DecodeRow
{
    int row, sequence, position, first_split, num_splits, unused[3];
};

/* Running softmax of a warp's positions, in units of score_scale.  The lane's g is its head; it has
 * the sums of heads 2t and 2t + 1, for the values 64 step + 8 g + 2 i and the next:
 *     sums[4 step + i] = value of head 2t, value of head 2t + 1, next of 2t, next of 2t + 1
 * weight_sum is over the lane's own positions only. */
struct Softmax
{
    float sums[4 * V_STEPS][4];
    float largest, weight_sum;
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
