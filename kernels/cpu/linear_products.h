/* Products of quantized weights with tiles of activations, in one of three arithmetics:
 * linear_dot4.h or linear_madd.c, by way of linear_products.c, and linear_amx.c on CPUs with
 * AMX. */
#ifndef LINEAR_PRODUCTS_H
#define LINEAR_PRODUCTS_H

#include "linear_formats.h"
#include "linear_tiles.h"

/* A unit of work takes at most this many tiles, and this many bytes of them. */
#ifdef TIER_AMX
enum { MAX_CHUNK_TILES = 32, CHUNK_BYTES = 1 << 20 };
#else
enum { MAX_CHUNK_TILES = 1 << 16, CHUNK_BYTES = 512 << 10 };
#endif

/* Neighbouring groups of weights, at w; `group` is the number of the first one in its part. */
typedef struct {
    const WeightPart *part;
    const uint8_t *w;
    int group, num_groups;
} WeightGroups;

static inline int num_pairs(WeightGroups groups) { return (groups.num_groups + 1) / 2; }

/* Two neighbours, or the last group alone.  In an operation with gated activation: a gate and its
 * up. */
static inline WeightGroups pair_of(WeightGroups groups, int i)
{
    size_t size = group_bytes(groups.part->format, groups.part->columns);
    int left = groups.num_groups - 2 * i;
    return (WeightGroups){
        groups.part, groups.w + 2 * size * (size_t)i, groups.group + 2 * i, left < 2 ? left : 2};
}

/* Multiplies groups by tiles first .. end - 1 of the step's rows, and applies the epilogue
 * (linear_epilogue.h). */
void multiply_tiles(
    const Operation *operation, WeightGroups groups, int num_rows, int first, int end);

/* Multiplies a pair by one row, which is a tile of its own. */
void multiply_row(const Operation *operation, WeightGroups pair, int x_row, int out_row);

#endif
