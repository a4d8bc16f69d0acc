/* The blocks of a file's tensors. */
#ifndef LINEAR_PACK_H
#define LINEAR_PACK_H

#include <stdint.h>

#include "linear_formats.h"

/* One row of 32 columns taken out of a file's block: its integers and its scales, as linear_formats.h has
 * them. */
typedef struct {
    uint8_t q[BLOCK_COLUMNS];
    uint16_t d, m;
    uint8_t s, t;
} FileBlock;

/* FileBlock k of a row whose file blocks begin at `row`. */
FileBlock unpack_file_block(int format, const uint8_t *row, int k);

#endif
