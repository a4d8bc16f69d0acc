/* Attention of prompts: out = softmax(cap(q @ K.T * scale)) @ V, tile by tile on tensor cores.
 *
 * q             T16 [rows, NUM_HEADS, PADDED_DIM]
 * keys, values  T16 [num_blocks, num_layers, NUM_KV_HEADS, BLOCK_SIZE, PADDED_DIM]
 * out           Out [rows, out_stride]: HEAD_DIM values a head
 * positions     int [rows]; a row attends to the positions up to its own, at most `window` of them
 * sequences     int [rows], an index into block_tables [sequences, *max_blocks]
 * tiles         int2 [tiles]: first row, and number of rows, at most TILE_ROWS; consecutive rows of
 *               one sequence, in order of their positions
 *
 * Grid (NUM_GROUPS, tiles).  A block computes the rows of a tile for a group of heads that share a
 * kv head.  Row and head together are one of the NUM_QUERIES rows of its products: queries
 * GROUP_HEADS * row + head.  A warp has M_TILES times 16 of them; their sums stay in registers.
 * Keys and values come through shared memory, TILE_KEYS positions at a time, while the tile before
 * is computed (cp.async; before sm_80 plain copies).
 * Tiles of keys begin at multiples of TILE_KEYS, and a tile that is hidden from a query changes
 * none of its bits.  So bits depend on the row's own sequence alone.
 *
 * Macros, chosen by backend/cuda/attention.py so that a block fits: NUM_WARPS, M_TILES, TILE_KEYS.
 * Dynamic shared memory: T16 [NUM_QUERIES + 4 * TILE_KEYS][PADDED_DIM + 8].  With the 8 values of
 * padding, a row is an odd multiple of 16 bytes long, so that ldmatrix meets no bank conflicts.
 * Source: Dao 2023, "FlashAttention-2". */
#include "attention.cuh"

#define NUM_THREADS (NUM_WARPS * 32)
#define WARP_QUERIES (16 * M_TILES)
#define NUM_QUERIES (WARP_QUERIES * NUM_WARPS)
#define TILE_ROWS (NUM_QUERIES / GROUP_HEADS)
#define STRIDE (PADDED_DIM + 8)
#define DIM_TILES (PADDED_DIM / 16)
#define CHUNKS (PADDED_DIM / 8) /* of 16 bytes in a row */

/* Of each query: lane group g has queries g and g + 8 of each m-tile. */
struct Softmax
{
    float sums[M_TILES][2 * DIM_TILES][4];
    float largest[M_TILES][2], weight_sum[M_TILES][2];
};

typedef T16 Row[STRIDE];

/* Starts copying a tile of keys and values; positions from `end` on become zeros. */
__device__ __forceinline__ void copy_tile(Row *shared_keys, Row *shared_values, const T16 *keys,
                                          const T16 *values, const int *table, int tile, int end,
                                          int layer, int num_layers, int kv_head)
{
#pragma unroll
    for (int key = 0; key < TILE_KEYS; key += BLOCK_SIZE) {
        const int num_keys = end - tile * TILE_KEYS - key; /* from here on */
        const int block = num_keys > 0 ? table[(tile * TILE_KEYS + key) / BLOCK_SIZE] : 0;
        const long long offset = block_offset(block, layer, num_layers, kv_head);
#pragma unroll
        for (int chunk = 0; chunk < BLOCK_SIZE * CHUNKS; chunk += NUM_THREADS) {
            const int i = chunk + threadIdx.x, row = i / CHUNKS, dim = i % CHUNKS * 8;
            if (BLOCK_SIZE * CHUNKS % NUM_THREADS && i >= BLOCK_SIZE * CHUNKS)
                break;
            cp_async_16(&shared_keys[key + row][dim], keys + offset + 8 * i, row < num_keys);
            cp_async_16(&shared_values[key + row][dim], values + offset + 8 * i, row < num_keys);
        }
    }
    cp_async_commit();
}

/* Copies the tile's queries to shared memory, zeros where there is none. */
__device__ __forceinline__ void copy_queries(
    Row *queries, const T16 *q, int first_row, int num_rows, HeadGroup group)
{
    for (int i = threadIdx.x; i < NUM_QUERIES * CHUNKS; i += NUM_THREADS) {
        const int query = i / CHUNKS, dim = i % CHUNKS * 8;
        const int row = query / GROUP_HEADS, head = query % GROUP_HEADS;
        uint4 loaded = make_uint4(0, 0, 0, 0);
        if (row < num_rows && head < group.num_heads)
            loaded = *(const uint4 *)(q
                                      + ((long long)(first_row + row) * NUM_HEADS
                                         + group.first_head + head)
                                            * PADDED_DIM
                                      + dim);
        *(uint4 *)&queries[query][dim] = loaded;
    }
}

/* products = queries @ keys.T of a warp. */
__device__ __forceinline__ void multiply_keys(
    float (*products)[TILE_KEYS / 8][4], const Row *queries, const Row *keys)
{
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int dim = 0; dim < PADDED_DIM; dim += 16) {
        unsigned a[M_TILES][4];
#pragma unroll
        for (int m = 0; m < M_TILES; m++)
            ldmatrix_x4<false>(a[m], &queries[16 * m + lane % 16][dim + lane / 16 * 8]);
#pragma unroll
        for (int key = 0; key < TILE_KEYS; key += 16) {
            unsigned b[4];
            ldmatrix_x4<false>(
                b, &keys[key + lane / 16 * 8 + lane % 8][dim + lane / 8 % 2 * 8]);
#pragma unroll
            for (int m = 0; m < M_TILES; m++) {
                mma_m16n8k16<T16>(products[m][key / 8], a[m], b);
                mma_m16n8k16<T16>(products[m][key / 8 + 1], a[m], b + 2);
            }
        }
    }
}

__device__ __forceinline__ void cap(
    float (*scores)[TILE_KEYS / 8][4], float scale, float softcap)
{
#pragma unroll
    for (int m = 0; m < M_TILES; m++)
#pragma unroll
        for (int key = 0; key < TILE_KEYS / 8; key++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                scores[m][key][i] = capped(scores[m][key][i], scale, softcap);
}

/* Masks a query's scores of positions other than first .. end - 1. */
__device__ __forceinline__ void mask(float (*scores)[4], int half, int tile, int first, int end)
{
#pragma unroll
    for (int key = 0; key < TILE_KEYS / 8; key++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int position = tile * TILE_KEYS + 8 * key + threadIdx.x % 4 * 2 + i;
            if (position < first || position >= end)
                scores[key][2 * half + i] = MASKED;
        }
}

/* Turns a query's scores into weights, and its sums to the new largest score. */
__device__ __forceinline__ void weigh(
    Softmax *softmax, float (*scores)[4], int m, int half, float unit)
{
    float largest = softmax->largest[m][half];
#pragma unroll
    for (int key = 0; key < TILE_KEYS / 8; key++)
#pragma unroll
        for (int i = 0; i < 2; i++)
            largest = fmaxf(largest, scores[key][2 * half + i]);
    largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 2));
    const float shrink = exp2f((softmax->largest[m][half] - largest) * unit);
    /* While all positions were masked, MASKED - 0 makes their weights 0. */
    const float subtracted = largest == MASKED ? 0.0f : largest * unit;
    float weight_sum = softmax->weight_sum[m][half] * shrink;
#pragma unroll
    for (int key = 0; key < TILE_KEYS / 8; key++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float weight = exp2f(fmaf(scores[key][2 * half + i], unit, -subtracted));
            scores[key][2 * half + i] = weight;
            weight_sum += weight;
        }
    softmax->largest[m][half] = largest;
    softmax->weight_sum[m][half] = weight_sum;
#pragma unroll
    for (int i = 0; i < 2 * DIM_TILES; i++) {
        softmax->sums[m][i][2 * half] *= shrink;
        softmax->sums[m][i][2 * half + 1] *= shrink;
    }
}

/* sums += weights @ values of a warp.  The products of keys are laid out as this product's operand
 * must be: two of 8 positions make one of 16. */
__device__ __forceinline__ void add_values(
    Softmax *softmax, float (*weights)[TILE_KEYS / 8][4], const Row *values)
{
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int key = 0; key < TILE_KEYS; key += 16) {
        unsigned a[M_TILES][4];
#pragma unroll
        for (int m = 0; m < M_TILES; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float *pair = &weights[m][key / 8 + i / 2][i % 2 * 2];
                a[m][i] = pack_weights(pair[0], pair[1]);
            }
#pragma unroll
        for (int dim = 0; dim < PADDED_DIM; dim += 16) {
            unsigned b[4];
            ldmatrix_x4<true>(b, &values[key + lane % 16][dim + lane / 16 * 8]);
#pragma unroll
            for (int m = 0; m < M_TILES; m++) {
                mma_m16n8k16<T16>(softmax->sums[m][dim / 8], a[m], b);
                mma_m16n8k16<T16>(softmax->sums[m][dim / 8 + 1], a[m], b + 2);
            }
        }
    }
}

/* Writes a query's output. */
__device__ __forceinline__ void store_query(Out *out, Softmax *softmax, int m, int half)
{
    const int t = threadIdx.x % 4;
    const float share = 1.0f / softmax->weight_sum[m][half];
#pragma unroll
    for (int i = 0; i < 2 * DIM_TILES; i++) {
        const int dim = 8 * i + 2 * t;
        const float *pair = &softmax->sums[m][i][2 * half];
        if (dim < HEAD_DIM)
            store_pair(out + dim, pair[0] * share, pair[1] * share);
    }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS) prefill_attention(
    Out *out, long long out_stride, const T16 *q, const T16 *keys, const T16 *values,
    const int *positions, const int *sequences, const int *block_tables, const int *max_blocks,
    const int2 *tiles, int layer, int num_layers, float scale, float softcap, int window)
{
    extern __shared__ __align__(16) unsigned char shared[];
    Row *queries = (Row *)shared;
    Row *shared_keys = queries + NUM_QUERIES;           /* two tiles */
    Row *shared_values = shared_keys + 2 * TILE_KEYS;   /* two tiles */

    const int first_row = tiles[blockIdx.y].x, num_rows = tiles[blockIdx.y].y;
    const HeadGroup group = head_group(blockIdx.x);
    const int *table = block_tables + (long long)sequences[first_row] * *max_blocks;
    const int least = positions[first_row], end = positions[first_row + num_rows - 1] + 1;
    const int start_tile = first_attended(least, window) / TILE_KEYS;
    const int end_tile = (end + TILE_KEYS - 1) / TILE_KEYS;
    /* Every row attends to all positions of the tiles of keys between these. */
    const int first_whole = (first_attended(end - 1, window) + TILE_KEYS - 1) / TILE_KEYS;
    const int end_whole = (least + 1) / TILE_KEYS;
    copy_tile(shared_keys, shared_values, keys, values, table, start_tile, end, layer, num_layers,
              group.kv_head);
    copy_queries(queries, q, first_row, num_rows, group);

    /* The positions that each of the lane's queries attends to; none: it is not stored. */
    const int first_query = threadIdx.x / 32 * WARP_QUERIES + threadIdx.x % 32 / 4;
    int first[M_TILES][2], position[M_TILES][2];
#pragma unroll
    for (int m = 0; m < M_TILES; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int query = first_query + 16 * m + 8 * half, row = query / GROUP_HEADS;
            const bool is_used = row < num_rows && query % GROUP_HEADS < group.num_heads;
            position[m][half] = is_used ? positions[first_row + row] : -1;
            first[m][half] = first_attended(position[m][half], window);
        }

    Softmax softmax = {};
#pragma unroll
    for (int m = 0; m < M_TILES; m++)
        softmax.largest[m][0] = softmax.largest[m][1] = MASKED;
    for (int tile = start_tile; tile < end_tile; tile++) {
        const int stage = (tile - start_tile) % 2 * TILE_KEYS;
        cp_async_wait<0>();
        __syncthreads(); /* this tile has arrived, and the one before is no longer read */
        if (tile + 1 < end_tile)
            copy_tile(shared_keys + TILE_KEYS - stage, shared_values + TILE_KEYS - stage, keys,
                      values, table, tile + 1, end, layer, num_layers, group.kv_head);
        float scores[M_TILES][TILE_KEYS / 8][4] = {};
        multiply_keys(scores, queries + threadIdx.x / 32 * WARP_QUERIES, shared_keys + stage);
        cap(scores, scale, softcap);
        if (tile < first_whole || tile >= end_whole) {
#pragma unroll
            for (int m = 0; m < M_TILES; m++)
#pragma unroll
                for (int half = 0; half < 2; half++)
                    mask(scores[m], half, tile, first[m][half], position[m][half] + 1);
        }
#pragma unroll
        for (int m = 0; m < M_TILES; m++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                weigh(&softmax, scores[m], m, half, score_scale(scale));
        add_values(&softmax, scores, shared_values + stage);
    }

#pragma unroll
    for (int m = 0; m < M_TILES; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float *weight_sum = &softmax.weight_sum[m][half];
            *weight_sum += __shfl_xor_sync(ALL_LANES, *weight_sum, 1);
            *weight_sum += __shfl_xor_sync(ALL_LANES, *weight_sum, 2);
            const int query = first_query + 16 * m + 8 * half;
            if (position[m][half] >= 0)
                store_query(out + (first_row + query / GROUP_HEADS) * out_stride
                                + (group.first_head + query % GROUP_HEADS) * HEAD_DIM,
                            &softmax, m, half);
        }
}
