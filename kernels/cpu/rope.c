#include "rope.h"
#include "kv_cache.h"
#include "norm.h"
#include "rows.h"

/* cos_sin[row] = [cos, sin] of position * frequency.  The frequencies are `weight`, or
 * `second_weight` for long sequences. */
void run_cos_sin(const Plan *plan, const Operation *operation, int first, int end)
{
    const Batch *batch = &plan->batch;
    for (int row = first; row < end; row++) {
        int is_long = operation->second_weight && batch->is_long[batch->sequences[row]];
        const float *frequencies = is_long ? operation->second_weight : operation->weight;
        float *out = operation->cos_sin + (int64_t)row * 2 * operation->half_rotary_dim;
        for (int i = 0; i < operation->half_rotary_dim; i++) {
            float angle = (float)batch->positions[row] * frequencies[i];
            out[i] = cosf(angle) * operation->magnitude;
            out[operation->half_rotary_dim + i] = sinf(angle) * operation->magnitude;
        }
    }
}

/* Rotates the pairs of one head in place. */
static void rotate(float *x, const float *cosines, int half, int is_interleaved)
{
    const float *sines = cosines + half;
    if (is_interleaved) {
        for (int i = 0; i < half; i++) {
            float a = x[2 * i], b = x[2 * i + 1];
            x[2 * i] = a * cosines[i] - b * sines[i];
            x[2 * i + 1] = b * cosines[i] + a * sines[i];
        }
        return;
    }
    FOR_VECTORS(i, half) {
        int n = lanes_left(half, i);
        f32v a = load_partial(x + i, n), b = load_partial(x + half + i, n);
        f32v cosine = load_partial(cosines + i, n), sine = load_partial(sines + i, n);
        store_partial(x + i, a * cosine - b * sine, n);
        store_partial(x + half + i, b * cosine + a * sine, n);
    }
}

static void norm_heads(float *x, int heads, int dim, const float *weight, float eps, int all)
{
    if (all) {
        norm_row(x, weight, heads * dim, eps, x, 0);
        return;
    }
    for (int h = 0; h < heads; h++)
        norm_row(x + h * dim, weight, dim, eps, x + h * dim, 0);
}

/* A row is [q heads, k heads, v heads], side by side. */
void run_rope(const Plan *plan, const Operation *operation, int first, int end)
{
    int dim = plan->head_dim, heads = plan->num_heads, kv_heads = plan->num_kv_heads;
    const int64_t *slots = plan->batch.slot_mapping;
    for (int row = first; row < end; row++) {
        if (row + 1 < plan->batch.num_rows
            && slots[row + 1] / BLOCK_SIZE != slots[row] / BLOCK_SIZE)
            prefetch_kv(plan, operation->layer, slots[row + 1]);
        float *q = out_row(operation, row), *k = q + heads * dim;
        if (operation->weight)
            norm_heads(q, heads, dim, operation->weight, operation->eps,
                       operation->norms_across_heads & 1);
        if (operation->second_weight)
            norm_heads(k, kv_heads, dim, operation->second_weight, operation->eps,
                       operation->norms_across_heads & 2);
        if (operation->cos_sin) {
            const float *cosines = operation->cos_sin
                                   + (int64_t)row * 2 * operation->half_rotary_dim;
            for (int h = 0; h < heads + kv_heads; h++)
                rotate(q + h * dim, cosines, operation->half_rotary_dim, operation->option);
        }
        store_kv(plan, operation->layer, slots[row], k, k + kv_heads * dim);
    }
}
