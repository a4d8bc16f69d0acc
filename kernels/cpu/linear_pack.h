/* Reads the quantized blocks of a file's tensors. */
#ifndef LINEAR_PACK_H
#define LINEAR_PACK_H

#include <stdint.h>

#include "linear_formats.h"

/* 32 columns of one row, from a file's block: integers and scales as in linear_formats.h. */
typedef struct {
    uint8_t q[BLOCK_COLUMNS];
    uint16_t d, m;
    uint8_t s, t;
} FileBlock;

/* Block k of the row at `row`. */
FileBlock unpack_file_block(int format, const uint8_t *row, int k);

#endif
