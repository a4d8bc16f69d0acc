/* Products of quantized weights with activations of 16 bits, in integers, with AMX.
 *
 * A weight is D q + M units: each row has a unit, and each block its scale and minimum as multiples
 * of it, the integers D and M.  Weights of four bits become 16 bits long, the others 23.
 * Activations are cut into segments of up to 640 columns, each of integers with one scale.  Then
 *     y[r][i] = unit[i] * sum over segments s of  scale[r][s] float(total)
 *     total   = sum over blocks of  D (q . x) + M sum(x),  without its last bits
 * The integers are exact in any order of summation.  Few rows multiply q as it lies in memory and
 * sum in 64 bits, at the speed of memory (gemv).  Many rows multiply D q + M, computed once for all
 * of them, as two or three planes of bytes by two planes of activations (gemm).  So neither the
 * number of rows nor the tiles change a bit of y.
 *
 * An AMX tile has 16 rows of 64 bytes (Intel 64 and IA-32 Software Developer's Manual, volume 1,
 * chapter 18).  Its products multiply bytes of two tiles, the second with four columns of sixteen
 * rows side by side: exactly what a vector of linear_formats.h holds. */
#ifndef LINEAR_AMX_SCALES_H
#define LINEAR_AMX_SCALES_H

#include "linear_products.h"
#include "linear_unpack.h"

enum { PREFETCH_L2 = 10240, PREFETCH_L1 = 2048 }; /* as in linear_blocks.h */

/* Multiplies a pair of groups by the R <= GEMV_ROWS rows of `tile`, whose first row of out is
 * `row`. */
void run_gemv(const Operation *operation, WeightGroups pair, int row, int R, const int32_t *tile);

/* Multiplies groups by tiles first .. end - 1, in AMX tiles. */
void run_gemm(
    const Operation *operation, WeightGroups groups, int num_rows, int first, int end);

/* ---- Weights as integers */

INLINE f32v inverse_units(const uint8_t *group)
{
    return splat(1) / load((const float *)group);
}

/* The number of low bits dropped from a total so that 32 bits hold it; it depends on the weights'
 * length. */
INLINE int total_shift(const int format) { return weight_planes(format) == 2 ? 9 : 16; }

/* The value of 1 in a shortened total, for each row. */
INLINE f32v total_units(const int format, const uint8_t *group)
{
    return load((const float *)group) * splat((float)(1 << total_shift(format)));
}

/* D and M of one half of a block; only in Q6_K do the halves differ.  M is for q with its zero
 * point.  With four bits, M also contains D's rounding error for a q in the middle of its range. */
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
    /* Unsigned, because inputs with NaN may overflow. */
    *M = (i32v)((u32v)round_to_int(m) - (u32v)*D * (uint32_t)zero_point(format));
}

#endif
