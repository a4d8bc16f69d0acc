/* Products of quantised weights with activations of 16 bits, in integers, on matrix registers.
 *
 * A weight is D q + M units: each row has its unit, and each block its scale and minimum in it, as
 * integers D and M.  Weights of four bits come out 16 bits long, the others 23.  Activations are cut
 * into stretches of up to 640 columns, each of integers with one scale.  Then
 *
 *     y[r][i] = unit[i] * sum over stretches s of  scale[r][s] float(total)
 *     total   = sum over blocks of  D (q . x) + M sum(x),  less its last bits
 *
 * where the integers are exact however they are summed: few rows multiply q as it lies in memory and
 * sum in 64 bits, at the speed of memory; many rows multiply D q + M, made once for all of them, two
 * or three planes of bytes by two of the activations.  So neither the number of rows nor the tiles
 * change a bit of y.
 *
 * A matrix register has 16 rows of 64 bytes (Intel 64 and IA-32 Software Developer's Manual, volume 1,
 * chapter 18).  Its products take bytes from two of them, four columns of sixteen rows side by side in
 * the second: just what a vector of linear_formats.h holds. */
#ifndef LINEAR_AMX_H
#define LINEAR_AMX_H

#include "linear_products.h"
#include "linear_unpack.h"

enum { PREFETCH_L2 = 10240, PREFETCH_L1 = 2048 }; /* as in linear_blocks.h */

/* A pair of groups times R <= GEMV_ROWS rows, a tile, from `row` on. */
void run_gemv(const Operation *operation, WeightGroups pair, int row, int R, const int32_t *tile);

/* Groups times tiles first .. end - 1, in AMX tiles. */
void run_gemm(
    const Operation *operation, WeightGroups groups, int num_rows, int first, int end);

/* ---- Weights as integers */

INLINE f32v inverse_units(const uint8_t *group)
{
    return splat(1) / load((const float *)group);
}

/* Bits of a total that are left off, so that 32 hold it: as many as the weights' length allows. */
INLINE int total_shift(const int format) { return weight_planes(format) == 2 ? 9 : 16; }

/* What a total counts. */
INLINE f32v total_units(const int format, const uint8_t *group)
{
    return load((const float *)group) * splat((float)(1 << total_shift(format)));
}

/* D and M of a block's half, the same for both halves but in Q6_K; M counts for q without offset.
 * What D lost when it was rounded is in M for a q in the middle of four bits. */
INLINE void integer_scales(
    const int format,
    const uint8_t *w,
    const uint8_t *head,
    f32v inverse,
    const int half,
    i32v *D,
    i32v *M)
{
    f32v d, m;
    load_scales(format, w, head, half, 0, &d, &m);
    d *= inverse;
    m = has_minimum(format) ? m * inverse : splat(0);
    *D = round_to_int(d);
    if (weight_planes(format) == 2)
        m += (d - to_float(*D)) * splat(7.5f - (float)zero_point(format));
    /* Unsigned, for what is not a number may overflow. */
    *M = (i32v)((u32v)round_to_int(m) - (u32v)*D * (uint32_t)zero_point(format));
}

#endif
