/* out = epilogue(x @ W.T) for many rows of x, on tensor cores.
 *
 *   x  [num_rows, x_stride] T16, zero from its own width to `columns`
 *   W  planes, column_tiles tiles in a row of tiles (formats.cuh)
 *   groups, num_groups, sorted_choices, chosen_of_x  with GROUPED: see grouped.cuh
 * A block computes BLOCK_ROWS rows of x, or a group, by BLOCK_WIDTH rows of W; the grid has one block
 * for each such tile.  Dynamic shared memory: STAGES * sizeof(Stage), then BLOCK_ROWS * SUMS_STRIDE
 * float in the same place.
 *
 * A step takes one tile of columns.  STAGES of them are in shared memory: while one is multiplied,
 * cp.async fills the others.  The weights stay packed there.  They are `a` of the mma, so each warp
 * dequantizes the rows that it needs straight to fragments; 16 bytes a lane of x are two fragments
 * `b`, with the columns in the order of the weights' pieces.  So all loads of fragments are 512
 * contiguous bytes, free of bank conflicts, and nothing is written to shared memory twice.  With
 * quantized weights a warp computes half as many columns, to have registers left to dequantize in.
 *
 * A sum is over the columns in order, whatever the tiles: the bits of a row depend on nothing but
 * the row. */
#include "common.cuh"
#include "ptx.cuh"
#include "formats.cuh"
#include "epilogue.cuh"
#include "grouped.cuh"

constexpr int X_WARPS = 2;                         /* warps along x's rows */
constexpr int W_WARPS = Row::HAS_SCALES ? 4 : 2;   /* and along W's */
constexpr int THREADS = 32 * X_WARPS * W_WARPS;
constexpr int X_GROUPS = BLOCK_ROWS / X_WARPS / 8; /* groups of 8 rows of x, of a warp */
constexpr int W_TILES = BLOCK_WIDTH / W_WARPS / TILE_ROWS; /* tiles of 16 rows of W, of a warp */
constexpr int BLOCK_TILES = BLOCK_WIDTH / TILE_ROWS;
constexpr int SUMS_STRIDE = BLOCK_WIDTH + 4; /* the lanes of a warp write to 32 different banks */
/* Blocks that share these rows of blocks run together, so that their x stays in the L2 cache. */
constexpr int RASTER_ROWS = 8;

/* The bytes of a plane in a stage; an array cannot be empty. */
__device__ constexpr int plane_bytes(int row_bytes) { return row_bytes > 0 ? BLOCK_WIDTH * row_bytes : 16; }

struct alignas(16) Stage {
    T16 x[Row::BLOCKS][BLOCK_ROWS][BLOCK_COLUMNS];
    unsigned char values[plane_bytes(64)];
    unsigned char high[plane_bytes(Row::HIGH_BYTES)];
    unsigned char scales[plane_bytes(Row::SCALE_BYTES)];
    unsigned char super_scales[plane_bytes(Row::SUPER_BYTES)];
};

/* Copies one plane of BLOCK_TILES tiles, of BYTES each, `pitch` tiles apart; zeros beyond num_tiles. */
template <int BYTES>
__device__ __forceinline__ void copy_plane(
    unsigned char *to, const unsigned char *from, long long pitch, int num_tiles)
{
    constexpr int UNITS = BYTES / 16;
    for (int i = threadIdx.x; i < BLOCK_TILES * UNITS; i += THREADS) {
        int tile = i / UNITS;
        bool exists = tile < num_tiles;
        long long offset = exists ? tile * pitch * BYTES + i % UNITS * 16 : 0;
        cp_async_16(to + i * 16, from + offset, exists);
    }
}

/* Copies the columns of a tile from rows of x; zeros beyond num_rows and beyond num_blocks. */
__device__ __forceinline__ void copy_x(Stage &stage, const T16 *x, long long x_stride,
    const int *x_rows, int num_rows, int num_blocks)
{
    constexpr int UNITS = Row::BLOCKS * 4;
    for (int i = threadIdx.x; i < BLOCK_ROWS * UNITS; i += THREADS) {
        int row = i / UNITS, block = i % UNITS / 4, piece = i % 4;
        bool exists = row < num_rows && block < num_blocks;
        long long offset = 0;
        if (exists)
            offset = x_rows[row] * x_stride + block * BLOCK_COLUMNS + piece * 8;
        cp_async_16(&stage.x[block][row][piece * 8], x + offset, exists);
    }
}

/* sums += x @ W.T over the columns of a stage. */
__device__ __forceinline__ void multiply(
    float (*sums)[X_GROUPS][4], const Stage &stage, int first_row, int first_tile)
{
    int lane = threadIdx.x % 32, group = lane / 4, piece = lane % 4;
    Planes planes = {stage.values, stage.high, stage.scales, stage.super_scales};
    Row rows[W_TILES][2];
#pragma unroll
    for (int tile = 0; tile < W_TILES; tile++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int row = (first_tile + tile) * TILE_ROWS + group + 8 * i;
            rows[tile][i].load<false>(planes, row, row, piece);
        }
#pragma unroll
    for (int block = 0; block < Row::BLOCKS; block++) {
        unsigned a[W_TILES][2][4];
#pragma unroll
        for (int tile = 0; tile < W_TILES; tile++) {
            unsigned pairs[2][4];
            dequantize(rows[tile][0], block, pairs[0]);
            dequantize(rows[tile][1], block, pairs[1]);
            fragments_a(a[tile], pairs[0], pairs[1]);
        }
#pragma unroll
        for (int n = 0; n < X_GROUPS; n++) {
            unsigned b[4];
            fragments_b(b, stage.x[block][first_row + 8 * n + group], piece);
#pragma unroll
            for (int tile = 0; tile < W_TILES; tile++) {
                mma_m16n8k16<T16>(sums[tile][n], a[tile][0], b);
                mma_m16n8k16<T16>(sums[tile][n], a[tile][1], b + 2);
            }
        }
    }
}

/* The block's place: RASTER_ROWS rows of blocks at a time, column after column. */
__device__ __forceinline__ void block_place(
    int row_blocks, int width_blocks, int *row_block, int *width_block)
{
    int raster = blockIdx.x / (RASTER_ROWS * width_blocks);
    int within = blockIdx.x % (RASTER_ROWS * width_blocks);
    int rows = min(row_blocks - raster * RASTER_ROWS, RASTER_ROWS);
    *row_block = raster * RASTER_ROWS + within % rows;
    *width_block = within / rows;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    linear_mma(void *out, long long out_stride, const T16 *x, long long x_stride,
        const unsigned char *values, const unsigned char *high, const unsigned char *scales,
        const unsigned char *super_scales, int num_rows, int width, int columns, int column_tiles,
        int row_tiles, const float *bias, float scale, float softcap, int gated, int accumulate,
        const Group *groups, const int *num_groups, const int *sorted_choices, int chosen_of_x)
{
    extern __shared__ uint4 dynamic_shared[];
    Stage *stages = (Stage *)dynamic_shared;
    Epilogue epilogue = {out, out_stride, width, bias, scale, softcap, gated, accumulate};
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, piece = lane % 4;
    __shared__ int x_rows[BLOCK_ROWS], out_rows[BLOCK_ROWS];
    int width_blocks = (row_tiles + BLOCK_TILES - 1) / BLOCK_TILES;
    long long expert_tile = 0;
#ifdef GROUPED
    int width_block = blockIdx.x % width_blocks, group_index = blockIdx.x / width_blocks;
    if (group_index >= *num_groups)
        return;
    Group own = groups[group_index];
    num_rows = own.num_rows;
    expert_tile = (long long)own.expert * row_tiles;
    for (int i = threadIdx.x; i < num_rows; i += THREADS) {
        out_rows[i] = sorted_choices[own.first + i];
        x_rows[i] = out_rows[i] / chosen_of_x;
    }
#else
    int row_block, width_block;
    block_place((num_rows + BLOCK_ROWS - 1) / BLOCK_ROWS, width_blocks, &row_block, &width_block);
    num_rows = min(num_rows - row_block * BLOCK_ROWS, BLOCK_ROWS);
    for (int i = threadIdx.x; i < num_rows; i += THREADS)
        x_rows[i] = out_rows[i] = row_block * BLOCK_ROWS + i;
#endif
    __syncthreads();
    int block_tile = width_block * BLOCK_TILES;

    auto copy_step = [&](int step) {
        if (step < column_tiles) {
            Stage &stage = stages[step % STAGES];
            long long tile = (expert_tile + block_tile) * column_tiles + step;
            int num_tiles = row_tiles - block_tile, first_block = step * Row::BLOCKS;
            copy_x(stage, x + first_block * BLOCK_COLUMNS, x_stride, x_rows, num_rows,
                columns / BLOCK_COLUMNS - first_block);
            copy_plane<TILE_ROWS * 64>(
                stage.values, values + tile * TILE_ROWS * 64, column_tiles, num_tiles);
            if constexpr (Row::HIGH_BYTES > 0)
                copy_plane<TILE_ROWS * Row::HIGH_BYTES>(stage.high,
                    high + tile * TILE_ROWS * Row::HIGH_BYTES, column_tiles, num_tiles);
            if constexpr (Row::SCALE_BYTES > 0)
                copy_plane<TILE_ROWS * Row::SCALE_BYTES>(stage.scales,
                    scales + tile * TILE_ROWS * Row::SCALE_BYTES, column_tiles, num_tiles);
            if constexpr (Row::SUPER_BYTES > 0)
                copy_plane<TILE_ROWS * Row::SUPER_BYTES>(stage.super_scales,
                    super_scales + tile / 2 * TILE_ROWS * Row::SUPER_BYTES, column_tiles / 2,
                    num_tiles);
        }
        cp_async_commit(); /* a group for each step, even if empty, so that they can be counted */
    };

    int first_row = warp % X_WARPS * X_GROUPS * 8, first_tile = warp / X_WARPS * W_TILES;
    float sums[W_TILES][X_GROUPS][4] = {};
    for (int step = 0; step < STAGES - 1; step++)
        copy_step(step);
    for (int step = 0; step < column_tiles; step++) {
        cp_async_wait<STAGES - 2>();
        /* The step's copies of all threads have arrived, and all have used the stage before it. */
        __syncthreads();
        copy_step(step + STAGES - 1);
        multiply(sums, stages[step % STAGES], first_row, first_tile);
    }

    /* By way of shared memory, so that a warp writes neighbours in a row. */
    float *block_sums = (float *)dynamic_shared;
    __syncthreads();
#pragma unroll
    for (int tile = 0; tile < W_TILES; tile++)
#pragma unroll
        for (int n = 0; n < X_GROUPS; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int row = first_row + 8 * n + 2 * piece + i % 2;
                int column = (first_tile + tile) * TILE_ROWS + group + 8 * (i / 2);
                block_sums[row * SUMS_STRIDE + column] = sums[tile][n][i];
            }
    __syncthreads();
    int tile_width = gated ? TILE_ROWS / 2 : TILE_ROWS;
    for (int row = warp; row < num_rows; row += THREADS / 32)
        for (int i = lane; i < BLOCK_TILES * tile_width; i += 32) {
            int tile = i / tile_width, column = block_tile * tile_width + i;
            const float *sum = block_sums + row * SUMS_STRIDE + tile * TILE_ROWS + i % tile_width;
            if (column < width && gated)
                store_gated(epilogue, out_rows[row], column, sum[0], sum[8]);
            else if (column < width)
                store(epilogue, out_rows[row], column, sum[0]);
        }
}
