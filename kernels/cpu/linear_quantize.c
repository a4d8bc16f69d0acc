/* QUANTIZE: writes rows as the tiles that products read.  Operations that produce such rows
 * quantize them at once, while they are in the cache. */
#include "linear.h"
#include "linear_tiles.h"
#include "rows.h"

void quantize_rows(const Operation *operation, const float *x, int stride, int first, int end)
{
    if (!operation->tiles)
        return;
    int rows = operation->one_row_tiles ? 1 : end - first;
    for (; first < end; first += rows, x += stride)
        quantize_tile(x, stride, operation->width, rows, tile_at(operation, first));
}

void run_quantize(const Operation *operation, int first, int end)
{
    quantize_rows(operation, x_row(operation, first), operation->x_stride, first, end);
}
