/* LINEAR: out = (x W' + bias) * scale, or out += that. */
#ifndef LINEAR_H
#define LINEAR_H

#include "plan.h"

/* The work of one thread's queue, in units of two groups of weights and a chunk of rows. */
int linear_units(const Operation *operation, int num_rows, int queue);
void run_linear(const Operation *operation, int num_rows, int queue, int first, int end);

/* For experts: pairs of groups in a queue, and one pair for one row, a tile by itself. */
int linear_pairs(const Operation *operation, int queue);
void run_linear_row(const Operation *operation,
                    const WeightPart *parts,
                    int queue,
                    int pair,
                    int x_row,
                    int out_row);

/* QUANTIZE: rows of x to tiles. */
void run_quantize(const Operation *operation, int first, int end);

#endif
