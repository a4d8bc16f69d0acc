/* SELECT and POOL: the rows that the model's head reads.  SOFTCAP: logits bent by tanh. */
#ifndef LOGIT_ROWS_H
#define LOGIT_ROWS_H

#include "plan.h"

void run_select(const Plan *plan, const Operation *operation, int first, int end);
void run_pool(const Plan *plan, const Operation *operation, int first, int end);
void run_softcap(const Operation *operation, int first, int end);

#endif
