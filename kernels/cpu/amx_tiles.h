/* Matrix registers: 16 rows of 64 bytes, whose products sum up four bytes at a time. */
#ifndef MATRIX_REGISTERS_H
#define MATRIX_REGISTERS_H

#include <immintrin.h>

/* Asks the kernel for them, for this process; 0 when it has them. */
int matrix_registers_denied(void);

/* Four sums; two planes of left factors of so many rows; two of right ones.  _tile_release ends it. */
void use_matrix_registers(int rows);

#endif
