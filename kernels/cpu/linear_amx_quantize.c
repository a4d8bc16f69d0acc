/* Activations to tiles of int8 planes, in the AMX layout of linear_tiles.h. */
#ifdef TIER_AMX
#include "linear_tiles.h"

/* The largest |x[i]|, i < count, a multiple of 16; infinity and NaN count as larger than all. */
INLINE float max_abs(const float *x, int count)
{
    i32v largest = splat_int(0);
    for (int i = 0; i < count; i += 16)
        largest = max_int(largest, abs_bits(load(x + i)));
    return float_from_bits(reduce_max_int(largest));
}

/* Quantizes columns first .. end - 1 of row r of R.  Returns their scale. */
INLINE float quantize_segment(
    const float *x, int first, int end, int width, int r, int R, int32_t *tile)
{
    float largest = max_abs(x + first, end - first);
    int is_finite = largest < INFINITY;
    f32v inverse = splat(is_finite && largest > 0x1p-100f ? 32512 / largest : 0);
    int32_t *sums = tile + sums_at(width, R) + r;
    for (int c = first; c < end; c += 16) {
        f32v value = is_finite ? load(x + c) : splat(0);
        i32v q = round_to_int(value * inverse);
        int8_t *out = (int8_t *)tile + (2 * (c / STEP_COLUMNS) * R + r) * STEP_COLUMNS
                      + c % STEP_COLUMNS;
        store_low_bytes(out, (q + 128) >> 8);
        store_low_bytes(out + STEP_COLUMNS * R, q);
        if (R <= GEMV_ROWS)
            sums[c / 16 * R] = reduce_add_int(q);
    }
    return is_finite ? largest / 32512 : NAN;
}

static void quantize_row(const float *x, int width, int r, int R, int32_t *tile)
{
    int columns = segment_steps(width) * STEP_COLUMNS;
    float *load_scales = (float *)(tile + scales_at(width, R)) + r;
    for (int first = 0; first < width; first += columns, load_scales += R) {
        int end = first + columns < width ? first + columns : width;
        *load_scales = quantize_segment(x, first, end, width, r, R, tile);
    }
    if (width % STEP_COLUMNS) {
        int8_t *rest = (int8_t *)tile + (2 * (width / STEP_COLUMNS) * R + r) * STEP_COLUMNS
                       + STEP_COLUMNS / 2;
        memset(rest, 0, STEP_COLUMNS / 2);
        memset(rest + STEP_COLUMNS * R, 0, STEP_COLUMNS / 2);
    }
}

void quantize_tile(const float *x, int stride, int width, int R, int32_t *tile)
{
    for (int r = 0; r < R; r++)
        quantize_row(x + (int64_t)r * stride, width, r, R, tile);
}

#endif
