/* NORM, ROPE, ACTIVATE and their like.  What a product reads next becomes a tile at once, while the
 * rows are in the cache. */
#include "rows.h"
#include "activation.h"
#include "kv_cache.h"
#include "linear_products.h"
#include "simd.h"

#define FOR_VECTORS(i, width) for (int i = 0; i < (width); i += LANES)

INLINE int lanes_left(int width, int i) { return width - i < LANES ? width - i : LANES; }

static void split_rows(const Operation *operation, const float *x, int stride, int first, int end)
{
    if (!operation->tiles)
        return;
    int rows = operation->by_row ? 1 : end - first;
    for (; first < end; first += rows, x += stride)
        split_tile(x, stride, operation->width, rows, tile_at(operation, first));
}

static float *row_of(const Operation *operation, int row)
{
    return operation->out + (int64_t)row * operation->out_stride;
}

static const float *x_of(const Operation *operation, int row)
{
    return operation->x + (int64_t)row * operation->x_stride;
}

/* cos and sin of positions times frequencies, which are `weight`, of long sequences
 * `second_weight`. */
void run_angles(const Plan *plan, const Operation *operation, int first, int end)
{
    const Batch *batch = &plan->batch;
    for (int row = first; row < end; row++) {
        int is_long = operation->second_weight && batch->is_long[batch->sequences[row]];
        const float *frequencies = is_long ? operation->second_weight : operation->weight;
        float *out = operation->angles + (int64_t)row * 2 * operation->half;
        for (int i = 0; i < operation->half; i++) {
            float angle = (float)batch->positions[row] * frequencies[i];
            out[i] = cosf(angle) * operation->magnitude;
            out[operation->half + i] = sinf(angle) * operation->magnitude;
        }
    }
}

/* out = x / sqrt(mean(x^2) + eps) * weight, or out += that; x may be out. */
static void norm(const float *x, const float *weight, int width, float eps, float *out, int adds)
{
    f32v squares = splat(0);
    FOR_VECTORS(i, width) {
        f32v v = load_first(x + i, lanes_left(width, i));
        squares = fma_v(v, v, squares);
    }
    f32v factor = splat(1 / sqrtf(sum_v(squares) / (float)width + eps));
    FOR_VECTORS(i, width) {
        int n = lanes_left(width, i);
        f32v v = load_first(x + i, n) * factor * load_first(weight + i, n);
        store_first(out + i, adds ? v + load_first(out + i, n) : v, n);
    }
}

void run_norm(const Operation *operation, int first, int end)
{
    for (int row = first; row < end; row++)
        norm(x_of(operation, row), operation->weight, operation->width, operation->eps,
             row_of(operation, row), operation->accumulate);
    split_rows(operation, row_of(operation, first), operation->out_stride, first, end);
}

void run_split(const Operation *operation, int first, int end)
{
    split_rows(operation, x_of(operation, first), operation->x_stride, first, end);
}

/* The pairs of one head, turned in place. */
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
        f32v a = load_first(x + i, n), b = load_first(x + half + i, n);
        f32v cosine = load_first(cosines + i, n), sine = load_first(sines + i, n);
        store_first(x + i, a * cosine - b * sine, n);
        store_first(x + half + i, b * cosine + a * sine, n);
    }
}

static void norm_heads(float *x, int heads, int dim, const float *weight, float eps, int all)
{
    if (all) {
        norm(x, weight, heads * dim, eps, x, 0);
        return;
    }
    for (int h = 0; h < heads; h++)
        norm(x + h * dim, weight, dim, eps, x + h * dim, 0);
}

/* x is [q heads, k heads, v heads] side by side. */
void run_rope(const Plan *plan, const Operation *operation, int first, int end)
{
    int dim = plan->head_dim, heads = plan->num_heads, kv_heads = plan->num_kv_heads;
    const int64_t *slots = plan->batch.slot_mapping;
    for (int row = first; row < end; row++) {
        if (row + 1 < plan->batch.num_rows && slots[row + 1] / BLOCK_SIZE != slots[row] / BLOCK_SIZE)
            fetch_kv(plan, operation->layer, slots[row + 1]);
        float *q = row_of(operation, row), *k = q + heads * dim;
        if (operation->weight)
            norm_heads(q, heads, dim, operation->weight, operation->eps, operation->norms_all & 1);
        if (operation->second_weight)
            norm_heads(k, kv_heads, dim, operation->second_weight, operation->eps,
                       operation->norms_all & 2);
        if (operation->angles) {
            const float *cosines = operation->angles + (int64_t)row * 2 * operation->half;
            for (int h = 0; h < heads + kv_heads; h++)
                rotate(q + h * dim, cosines, operation->half, operation->option);
        }
        store_kv(plan, operation->layer, slots[row], k, k + kv_heads * dim);
    }
}

void run_activate(const Operation *operation, int first, int end)
{
    int width = operation->width;
    for (int row = first; row < end; row++) {
        const float *gate = x_of(operation, row), *up = gate + width;
        float *out = row_of(operation, row);
        FOR_VECTORS(i, width) {
            int n = lanes_left(width, i);
            f32v v = activated(load_first(gate + i, n), operation->option);
            store_first(out + i, v * load_first(up + i, n), n);
        }
    }
    split_rows(operation, row_of(operation, first), operation->out_stride, first, end);
}

void run_select(const Plan *plan, const Operation *operation, int first, int end)
{
    for (int row = first; row < end; row++)
        memcpy(row_of(operation, row), x_of(operation, plan->batch.logit_rows[row]),
               sizeof(float) * (size_t)operation->width);
    split_rows(operation, row_of(operation, first), operation->out_stride, first, end);
}

void run_softcap(const Operation *operation, int first, int end)
{
    for (int row = first; row < end; row++) {
        float *out = row_of(operation, row);
        FOR_VECTORS(i, operation->width) {
            int n = lanes_left(operation->width, i);
            f32v v = load_first(out + i, n) / splat(operation->cap);
            store_first(out + i, splat(operation->cap) * tanh_v(v), n);
        }
    }
}

void run_pool(const Plan *plan, const Operation *operation, int first, int end)
{
    const Batch *batch = &plan->batch;
    for (int row = first; row < end; row++) {
        int last = batch->logit_rows[row], begin = last;
        if (operation->option)
            while (begin > 0 && batch->sequences[begin - 1] == batch->sequences[last])
                begin--;
        float *out = row_of(operation, row);
        for (int i = 0; i < operation->width; i++) {
            float total = 0;
            for (int r = begin; r <= last; r++)
                total += x_of(operation, r)[i];
            out[i] = total / (float)(last - begin + 1);
        }
    }
    split_rows(operation, row_of(operation, first), operation->out_stride, first, end);
}
