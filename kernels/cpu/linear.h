/* LINEAR: out = (x W' + bias) * scale, or out += that, or out = activation(gate) * up of two such
 * products. */
#ifndef LINEAR_H
#define LINEAR_H

#include "plan.h"

/* The work in one thread's queue, in units of two groups of weights and a chunk of rows. */
int linear_units(const Operation *operation, int num_rows, int queue);
void run_linear(const Operation *operation, int num_rows, int queue, int first, int end);

/* For EXPERTS: the pairs of groups in a queue, and the product of one pair with one row, which is a
 * tile of its own. */
int linear_pairs(const Operation *operation, int queue);
void run_linear_row(const Operation *operation,
                    const WeightPart *parts,
                    int queue,
                    int pair,
                    int x_row,
                    int out_row);

/* QUANTIZE: writes rows of x as tiles. */
void run_quantize(const Operation *operation, int first, int end);

#endif
