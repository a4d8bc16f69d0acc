/* ATTENTION and COMBINE: causal attention over the paged KV cache. */
#ifndef ATTENTION_H
#define ATTENTION_H

#include "plan.h"

/* Cuts the step's rows into query spans.  Called once a step, before its operations. */
void attention_prepare(Plan *plan);
int attention_units(const Plan *plan);
void run_attention(const Plan *plan, const Operation *operation, int first, int end, int thread);
void run_combine(const Plan *plan, const Operation *operation, int first, int end);

/* Floats of scratch memory that each thread needs. */
int64_t attention_scratch(int num_heads, int num_kv_heads, int padded_dim);

#endif
