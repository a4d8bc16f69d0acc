/* AMX tiles: registers of 16 rows of 64 bytes.  A product of two tiles adds up int8 dot products of
 * four. */
#ifndef AMX_TILES_H
#define AMX_TILES_H

#include <immintrin.h>

/* Asks the operating system to let this process use AMX.  Returns 0 if it does. */
int request_amx(void);

/* Configures tiles 0 .. 3 for int32 sums and 4, 5 for two planes of left factors, all with `rows`
 * rows, and 6, 7 for right factors.  Call _tile_release when done. */
void configure_amx_tiles(int rows);

#endif
