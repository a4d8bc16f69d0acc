/* SELECT: out[r] = x[logit_rows[r]].  POOL: out[r] = the last row of a sequence, or the mean of its
 * rows.  SOFTCAP: out = c tanh(out / c). */
#ifndef LOGIT_ROWS_H
#define LOGIT_ROWS_H

#include "plan.h"

void run_select(const Plan *plan, const Operation *operation, int first, int end);
void run_pool(const Plan *plan, const Operation *operation, int first, int end);
void run_softcap(const Operation *operation, int first, int end);

#endif
