/* COS_SIN: the cosines and sines of a step's positions.  ROPE: normalizes and rotates q and k of
 * each row, and stores k and v in the paged cache. */
#ifndef ROPE_H
#define ROPE_H

#include "plan.h"

void run_cos_sin(const Plan *plan, const Operation *operation, int first, int end);
void run_rope(const Plan *plan, const Operation *operation, int first, int end);

#endif
