/* Matrix registers: 16 rows of 64 bytes, whose products sum up four bytes at a time. */
#ifndef AMX_TILES_H
#define AMX_TILES_H

#include <immintrin.h>

/* Asks the kernel for them, for this process; 0 when it has them. */
int request_amx(void);

/* Four sums; two planes of left factors of so many rows; two of right ones.  _tile_release ends it. */
void configure_amx_tiles(int rows);

#endif
