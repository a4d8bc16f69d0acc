/* The layout of weights: sixteen rows side by side.
 *
 * A matrix is cut into groups of 16 rows and a group into blocks of 32 columns (of one column if
 * weights are floats).  A block holds, with the rows in order:
 *
 *              integers                     then, 16 of each   value of integer q           bytes
 *   Q4_0       256 nibbles                  half d             d (q - 8)                      288
 *   Q4_1       256 nibbles                  half d, half m     d q + m                        320
 *   Q5_0       256 nibbles, 64 high bits    half d             d (q - 16)                     352
 *   Q5_1       256 nibbles, 64 high bits    half d, half m     d q + m                        384
 *   Q8_0       512 bytes                    half d             d (q - 128)                    544
 *   Q4_K       256 nibbles                  u8 s, u8 t         d s q - m t                    288
 *   Q5_K       256 nibbles, 64 high bits    u8 s, u8 t         d s q - m t                    352
 *   Q6_K       256 nibbles, 128 high pairs  s8 s[2]            d s[column / 16] (q - 32)      416
 *   F32        float                                                                           64
 *   F16, BF16  half, bfloat                                                                    32
 *
 * Each eight blocks of a K format follow a head of 64 bytes: 16 half d, then 16 half m.  Byte 64 j
 * + 4 r + i of the nibbles holds, for row r, column 4 j + i in its low half and column 16 + 4 j + i
 * in its high half.  Byte 64 j + 4 r + i of the 512 bytes holds column 4 j + i.  So one vector has
 * four columns of sixteen rows, and no product ever sums across lanes.  Bit j of high byte 4 r + i
 * belongs to column 4 j + i, j < 8.  In the high pairs, byte 64 h + 4 r + i has those of columns 16
 * h + 4 j + i at bits 2 j. */
#ifndef LINEAR_FORMATS_H
#define LINEAR_FORMATS_H

#include <stddef.h>

enum { GROUP_ROWS = 16, BLOCK_COLUMNS = 32 };

enum Format { F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, NUM_FORMATS };

static inline int is_float(int format) { return format <= BF16; }

static inline size_t block_bytes(int format)
{
    static const short bytes[NUM_FORMATS] = {64, 32, 32, 288, 320, 352, 384, 544, 288, 352, 416};
    return (size_t)bytes[format];
}

static inline size_t head_bytes(int format) { return format >= Q4_K ? 64 : 0; }

/* Byte offsets in a group: of block k, and of the head of its eight blocks. */
static inline size_t block_offset(int format, int k)
{
    return block_bytes(format) * (size_t)k + head_bytes(format) * (size_t)(k / 8 + 1);
}

static inline size_t head_offset(int format, int k)
{
    return (8 * block_bytes(format) + head_bytes(format)) * (size_t)(k / 8);
}

/* With AMX (linear_amx_scales.h), a group begins with the unit of each row, a float; its weights
 * become integers of this many bytes. */
static inline int weight_planes(int format)
{
    return format == Q4_0 || format == Q4_1 || format == Q4_K ? 2 : 3;
}

#ifdef TIER_AMX
enum { UNITS_BYTES = 4 * GROUP_ROWS };
#else
enum { UNITS_BYTES = 0 };
#endif

static inline size_t group_bytes(int format, int columns)
{
    if (is_float(format))
        return block_bytes(format) * (size_t)columns;
    size_t heads = head_bytes(format) * (size_t)(columns / (8 * BLOCK_COLUMNS));
    return UNITS_BYTES + heads + block_bytes(format) * (size_t)(columns / BLOCK_COLUMNS);
}

#endif
