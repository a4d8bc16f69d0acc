/* ACTIVATE: out = silu(gate) * up, or gelu(gate) * up.  Each row of x is [gate, up], each of
 * `width` floats. */
#ifndef ACTIVATION_H
#define ACTIVATION_H

#include "plan.h"
#include "simd.h"

void run_activate(const Operation *operation, int first, int end);

/* silu(x) = x / (1 + exp(-x)).  gelu, by tanh: x / 2 (1 + tanh(u)) = x / (1 + exp(-2 u)) with u =
 * sqrt(2 / pi) (x + 0.044715 x^3). */
INLINE f32v activate(f32v x, int is_gelu)
{
    f32v u = is_gelu ? splat(1.5957691216f) * (x + splat(0.044715f) * x * x * x) : x;
    return x / (splat(1) + exp_v(splat(0) - u));
}

#endif
