/* out[row] = table[id] * scale, where the id may be one that the previous step sampled.
 *
 *   out          [num_rows, out_stride] float32
 *   table        the planes of a matrix with column_tiles tiles in a row (formats.cuh)
 *   ids          [num_rows] int32; -1 - r stands for sampled_ids[r], or for id 0 if that row failed
 *   sampled_ids  int32, negative if failed
 * A block a row; a thread takes a piece at a time. */
#include "common.cuh"
#include "ptx.cuh"
#include "formats.cuh"

__device__ __forceinline__ float dequantized(float integer, float scale, float minimum)
{
    if (!Row::HAS_SCALES)
        return integer;
    float product = __fmul_rn(integer, scale);
    return Row::HAS_MINIMA ? __fadd_rn(product, minimum) : product;
}

extern "C" __global__ void __launch_bounds__(128)
    embed(float *out, long long out_stride, const unsigned char *values, const unsigned char *high,
        const unsigned char *scales, const unsigned char *super_scales, const int *ids,
        const int *sampled_ids, int columns, int column_tiles, float scale)
{
    Planes planes = {values, high, scales, super_scales};
    int id = ids[blockIdx.x];
    if (id < 0)
        id = max(sampled_ids[-1 - id], 0);
    out += blockIdx.x * out_stride;
    for (int i = threadIdx.x; i < column_tiles * 4; i += blockDim.x) {
        int piece = i % 4;
        long long tile = (long long)(id / TILE_ROWS) * column_tiles + i / 4;
        Row row;
        int row_in_tile = id % TILE_ROWS;
        row.load<true>(
            planes, tile * TILE_ROWS + row_in_tile, tile / 2 * TILE_ROWS + row_in_tile, piece);
#pragma unroll
        for (int block = 0; block < Row::BLOCKS; block++) {
            unsigned pairs[4];
            row.integers(block, pairs);
#pragma unroll
            for (int p = 0; p < 4; p++) {
                int column = (i / 4 * Row::BLOCKS + block) * BLOCK_COLUMNS + column_of_pair(piece, p);
                float2 pair = unpack_T16(pairs[p]);
                float d = row.scale(block, p / 2), m = row.minimum(block);
                if (column < columns)
                    out[column] = dequantized(pair.x, d, m) * scale;
                if (column + 1 < columns)
                    out[column + 1] = dequantized(pair.y, d, m) * scale;
            }
        }
    }
}
