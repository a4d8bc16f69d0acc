/* NORM: out = x / sqrt(mean(x^2) + eps) * weight, or out += that. */
#ifndef NORM_H
#define NORM_H

#include "plan.h"

void run_norm(const Operation *operation, int first, int end);

/* One row of `width` floats; x and out may be the same. */
void norm_row(const float *x, const float *weight, int width, float eps, float *out, int adds);

#endif
