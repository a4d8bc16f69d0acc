/* out = epilogue(x @ W.T) for a few rows of x; with NORM, of rmsnorm(x) * norm_weight.
 *
 *   x            [num_rows, x_stride]: T16; with NORM float32
 *   W            planes, column_tiles tiles in a row of tiles (formats.cuh)
 *   columns      of W, a multiple of 32; x is zero from its own width to there
 *   norm_weight  [norm_width] float32;  norm_width  x's width
 *   groups, num_groups, sorted_choices, chosen_of_x  with GROUPED: see grouped.cuh
 * Grid: tiles_per_block tiles of 16 rows of W, by MAX_ROWS = 8 * ROW_GROUPS rows of x, or by groups.
 * With NORM or STAGED, x is kept in dynamic shared memory: num_rows * shared_stride T16.
 *
 * Bandwidth binds, so all is arranged for bytes in flight.  A block computes tiles_per_block tiles of
 * 16 rows of W, one after another.  Its warps take every eighth tile of columns, so that the block
 * reads a contiguous piece of memory, and load UNROLL of them before they use the first.  The first
 * are on their way while x is normalized or copied to shared memory.  The weights are `a` of the mma
 * and 8 rows of x its `b`: a lane's loads are fragments already, and one to eight rows cost the same.
 * The sums of the warps are added in order.  So the bits of a row depend on nothing but the row. */
#include "common.cuh"
#include "ptx.cuh"
#include "formats.cuh"
#include "epilogue.cuh"
#include "grouped.cuh"

#define WARPS 8
/* Tiles of columns that a warp loads before it uses the first. */
constexpr int UNROLL = Row::IN_FLIGHT / TILES;
#define MIN_BLOCKS (TILES * ROW_GROUPS < 4 ? 2 : 1) /* in a multiprocessor */
#define MAX_ROWS (8 * ROW_GROUPS)
#if defined(NORM) || defined(STAGED)
typedef int Offset;
#else
typedef long long Offset;
#endif
#define PARTIAL_STRIDE 20 /* of 16 sums; so the lanes of a warp write to 32 different banks */

/* sums += x @ W.T over the 32 columns of a block, for 16 rows of W and 8 of x. */
__device__ __forceinline__ void add_block(float *sums, const Row *rows, int block,
    const unsigned (*a)[4], const unsigned *b, const float *x_sums)
{
    if constexpr (!Row::HAS_SCALES) {
        mma_m16n8k16<T16>(sums, a[0], b);
        mma_m16n8k16<T16>(sums, a[1], b + 2);
    } else {
        float products[2][4] = {};
        mma_m16n8k16<T16>(products[0], a[0], b);
        mma_m16n8k16<T16>(products[Row::IS_HALVED], a[1], b + 2);
#pragma unroll
        for (int half = 0; half <= Row::IS_HALVED; half++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                sums[i] += rows[i / 2].scale(block, half) * products[half][i];
        if constexpr (Row::HAS_MINIMA)
#pragma unroll
            for (int i = 0; i < 4; i++)
                sums[i] += rows[i / 2].minimum(block) * x_sums[i];
    }
}

/* sums += x @ W.T over the columns of a tile, for TILES tiles of 16 rows of W.
 *   x           at the tile's first column
 *   offsets     from x to row lane / 4 of each 8 rows, or to the last row
 *   num_blocks  that x has from there on */
__device__ __forceinline__ void multiply(float (*sums)[ROW_GROUPS][4], const Row (*rows)[2],
    const T16 *x, const Offset *offsets, int num_blocks)
{
    int piece = threadIdx.x % 4;
#pragma unroll
    for (int block = 0; block < Row::BLOCKS; block++) {
        if (block >= num_blocks) /* also keeps the compiler from loading all of x at once */
            break;
        unsigned b[ROW_GROUPS][4];
#pragma unroll
        for (int n = 0; n < ROW_GROUPS; n++)
            fragments_b(b[n], x + offsets[n] + block * BLOCK_COLUMNS, piece);
        unsigned a[TILES][2][4];
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            unsigned pairs[2][4];
            rows[tile][0].integers(block, pairs[0]);
            rows[tile][1].integers(block, pairs[1]);
            fragments_a(a[tile], pairs[0], pairs[1]);
        }
#pragma unroll
        for (int n = 0; n < ROW_GROUPS; n++) {
            float x_sums[4] = {}; /* of the 32 columns: what a minimum is multiplied by */
            if constexpr (Row::HAS_MINIMA) {
                unsigned one = pair_of_float(1.0f), ones[4] = {one, one, one, one};
                mma_m16n8k16<T16>(x_sums, ones, b[n]);
                mma_m16n8k16<T16>(x_sums, ones, b[n] + 2);
            }
#pragma unroll
            for (int tile = 0; tile < TILES; tile++)
                add_block(sums[tile][n], rows[tile], block, a[tile], b[n], x_sums);
        }
    }
}

/* Writes rmsnorm(x) * weight to `out`, [num_rows, out_stride] of shared memory.  A warp takes 32 of
 * every 256 columns, of all rows, so that no row waits for another. */
__device__ __forceinline__ void normalize(T16 *out, int out_stride, const float *x,
    long long x_stride, int num_rows, int columns, int width, const float *weight, float eps)
{
    __shared__ float squares[MAX_ROWS][WARPS];
    int warp = threadIdx.x / 32;
    for (int row = 0; row < num_rows; row++) {
        float sum = 0.0f;
#pragma unroll 8
        for (int i = threadIdx.x; i < width; i += 32 * WARPS) {
            float value = x[row * x_stride + i];
            sum += value * value;
        }
        sum = warp_sum(sum);
        if (threadIdx.x % 32 == 0)
            squares[row][warp] = sum;
    }
    __syncthreads();
    for (int row = 0; row < num_rows; row++) {
        float sum = 0.0f;
        for (int i = 0; i < WARPS; i++)
            sum += squares[row][i];
        float factor = 1.0f / sqrtf(sum / width + eps);
#pragma unroll 8
        for (int i = threadIdx.x; i < columns; i += 32 * WARPS) {
            float value = i < width ? x[row * x_stride + i] * factor * weight[i] : 0.0f;
            out[row * out_stride + i] = to_T16(value);
        }
    }
    __syncthreads();
}

/* Loads a lane's rows of TILES tiles, one below the other.  Tiles beyond the last are copies of it. */
__device__ __forceinline__ void load_tiles(Row (*rows)[2], const Planes &planes,
    long long first_tile, int row_tile, int row_tiles, int column_tiles, int column_tile)
{
    int group = threadIdx.x % 32 / 4, piece = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        long long tile = first_tile + min(row_tile + i, row_tiles - 1);
        tile = tile * column_tiles + column_tile;
        long long row = tile * TILE_ROWS + group, super_row = tile / 2 * TILE_ROWS + group;
        rows[i][0].load<true>(planes, row, super_row, piece);
        rows[i][1].load<true>(planes, row + 8, super_row + 8, piece);
    }
}

/* Adds the sums of all warps for a tile of 16 rows of W, and writes the result. */
__device__ __forceinline__ void finish(const Epilogue &epilogue,
    const float (*partial)[MAX_ROWS][PARTIAL_STRIDE], int row_tile, const int *out_rows,
    int first_row, int num_rows)
{
    int tile_width = epilogue.gated ? TILE_ROWS / 2 : TILE_ROWS;
    for (int i = threadIdx.x; i < num_rows * tile_width; i += blockDim.x) {
        int row = i / tile_width, offset = i % tile_width;
        int column = row_tile * tile_width + offset;
        int out_row = out_rows ? out_rows[row] : first_row + row;
        float sum = 0.0f, up_sum = 0.0f;
        for (int warp = 0; warp < WARPS; warp++) {
            sum += partial[warp][row][offset];
            up_sum += partial[warp][row][TILE_ROWS - tile_width + offset];
        }
        if (column < epilogue.width && epilogue.gated)
            store_gated(epilogue, out_row, column, sum, up_sum);
        else if (column < epilogue.width)
            store(epilogue, out_row, column, sum);
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS)
    linear(void *out, long long out_stride, const void *x_rows, long long x_stride,
        const unsigned char *values, const unsigned char *high, const unsigned char *scales,
        const unsigned char *super_scales, int num_rows, int width, int columns, int column_tiles,
        int row_tiles, const float *bias, float scale, float softcap, int gated, int accumulate,
        int tiles_per_block, int shared_stride, const float *norm_weight, int norm_width,
        float norm_eps, const Group *groups, const int *num_groups,
        const int *sorted_choices, int chosen_of_x)
{
    __shared__ float partial[WARPS][MAX_ROWS][PARTIAL_STRIDE];
    Planes planes = {values, high, scales, super_scales};
    Epilogue epilogue = {out, out_stride, width, bias, scale, softcap, gated, accumulate};
    int lane = threadIdx.x % 32, group = lane / 4, piece = lane % 4;
    int warp = __shfl_sync(ALL_LANES, threadIdx.x / 32, 0); /* so that branches on it are uniform */
    int first_row = blockIdx.y * MAX_ROWS;
    num_rows = min(num_rows - first_row, MAX_ROWS);
    const int *choices = 0; /* the rows of out, if not all in order */
    long long expert_tile = 0;
#ifdef GROUPED
    if (blockIdx.y >= *num_groups)
        return;
    Group own = groups[blockIdx.y];
    num_rows = own.num_rows;
    choices = sorted_choices + own.first;
    expert_tile = (long long)own.expert * row_tiles;
#endif
    auto x_offset = [&](int row) {
        return (choices ? choices[row] / chosen_of_x : first_row + row) * x_stride;
    };

    Row rows[UNROLL][TILES][2];
    auto load_step = [&](int row_tile, int start) {
#pragma unroll
        for (int u = 0; u < UNROLL; u++)
            if (start + u * WARPS < column_tiles)
                load_tiles(rows[u], planes, expert_tile, row_tile, row_tiles, column_tiles,
                    start + u * WARPS);
    };
    int first_tile = blockIdx.x * tiles_per_block;
    int end_tile = min(first_tile + tiles_per_block, row_tiles);
    load_step(first_tile, warp);

#if defined(NORM) || defined(STAGED)
    extern __shared__ uint4 dynamic_shared[];
    T16 *x = (T16 *)dynamic_shared;
#else
    const T16 *x = (const T16 *)x_rows;
#endif
#if defined(NORM)
    normalize(x, shared_stride, (const float *)x_rows + x_offset(0), x_stride, num_rows, columns,
        norm_width, norm_weight, norm_eps);
#elif defined(STAGED)
    for (int row = 0; row < num_rows; row++)
        for (int i = 8 * threadIdx.x; i < columns; i += 8 * 32 * WARPS)
            cp_async_16(x + row * shared_stride + i, (const T16 *)x_rows + x_offset(row) + i, true);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
#endif
    Offset offsets[ROW_GROUPS];
#pragma unroll
    for (int n = 0; n < ROW_GROUPS; n++) {
        int row = min(8 * n + group, num_rows - 1); /* beyond the last, sums are not used */
#if defined(NORM) || defined(STAGED)
        offsets[n] = row * shared_stride;
#else
        offsets[n] = x_offset(row);
#endif
    }

    for (int row_tile = first_tile; row_tile < end_tile; row_tile += TILES) {
        float sums[TILES][ROW_GROUPS][4] = {};
        for (int start = warp; start < column_tiles; start += WARPS * UNROLL) {
            if (row_tile > first_tile || start > warp)
                load_step(row_tile, start);
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                int column = (start + u * WARPS) * Row::BLOCKS * BLOCK_COLUMNS;
                if (start + u * WARPS < column_tiles)
                    multiply(sums, rows[u], x + column, offsets, (columns - column) / BLOCK_COLUMNS);
            }
        }
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            if (row_tile + tile >= end_tile)
                break;
#pragma unroll
            for (int n = 0; n < ROW_GROUPS; n++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    partial[warp][8 * n + 2 * piece + i % 2][group + 8 * (i / 2)] = sums[tile][n][i];
            __syncthreads();
            finish(epilogue, partial, row_tile + tile, choices, first_row, num_rows);
            __syncthreads();
        }
    }
}
