/* Shared by operations that process each row on its own. */
#ifndef ROWS_H
#define ROWS_H

#include "plan.h"
#include "simd.h"

#define FOR_VECTORS(i, width) for (int i = 0; i < (width); i += LANES)

static inline float *out_row(const Operation *operation, int row)
{
    return operation->out + (int64_t)row * operation->out_stride;
}

static inline const float *x_row(const Operation *operation, int row)
{
    return operation->x + (int64_t)row * operation->x_stride;
}

/* Quantizes rows first .. end - 1 to the operation's tiles, if it has any; x points at row
 * `first`. */
void quantize_rows(const Operation *operation, const float *x, int stride, int first, int end);

#endif
