/* ROUTE, EXPERTS and SUM_EXPERTS: out += scale * sum over the chosen experts e of w_e * e(x), for
 * each row x.
 *
 * A choice is a row and one of its num_chosen experts; choice n belongs to row n / num_chosen. */
#ifndef EXPERTS_H
#define EXPERTS_H

#include "plan.h"

/* Chooses the top experts of all rows, and lists the choices of each expert. */
void run_route(const Operation *operation, int num_rows);

/* Products of the chosen experts, in units of an expert and two groups of its weights, so that each
 * weight is read once for all rows.  x has one row for each choice, or with `option` one row for
 * all choices of a row. */
int experts_units(const Operation *operation, int queue);
void run_experts(const Operation *operation, int queue, int first, int end);

/* out += scale * the weighted sum of a row's choices, best first. */
void run_sum_experts(const Operation *operation, int first, int end);

#endif
