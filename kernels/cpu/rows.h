/* The operations that treat each row by itself; first .. end are rows. */
#ifndef ROWS_H
#define ROWS_H

#include "plan.h"

void run_angles(const Plan *plan, const Operation *operation, int first, int end);
void run_norm(const Operation *operation, int first, int end);
void run_split(const Operation *operation, int first, int end);
void run_rope(const Plan *plan, const Operation *operation, int first, int end);
void run_activate(const Operation *operation, int first, int end);
void run_select(const Plan *plan, const Operation *operation, int first, int end);
void run_softcap(const Operation *operation, int first, int end);
void run_pool(const Plan *plan, const Operation *operation, int first, int end);

#endif
