/* The blocks of a file's tensors. */
#ifndef PACK_H
#define PACK_H

#include <stdint.h>

#include "linear_formats.h"

/* One row of 32 columns taken out of a file's block: its integers and its scales, as linear_formats.h has
 * them. */
typedef struct {
    uint8_t q[COLUMNS];
    uint16_t d, m;
    uint8_t s, t;
} Block;

/* Block k of a row whose file blocks begin at `row`. */
Block take_block(int format, const uint8_t *row, int k);

#endif
