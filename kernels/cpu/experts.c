/* ROUTE sorts the choices of the step by expert, so that products read each chosen expert's weights
 * once.  Each choice is a row of its own to the kernels: its sums never depend on the others. */
#include "experts.h"
#include "linear.h"
#include "simd.h"

/* What ROUTE writes: the expert and the weight of each choice, the choices sorted by expert (those
 * of expert e at offsets[e] .. offsets[e + 1] - 1), and the experts that have any. */
typedef struct {
    int32_t *topk_ids, *sorted, *offsets, *active, *num_active;
    float *topk_weights;
} Routing;

static Routing routing_of(const Operation *operation)
{
    int32_t *at = operation->choices, capacity = operation->max_choices;
    Routing c = {at, at + capacity, at + 2 * capacity, 0, 0, 0};
    c.active = c.offsets + operation->num_experts + 1;
    c.num_active = c.active + operation->num_experts;
    c.topk_weights = (float *)(c.num_active + 1);
    return c;
}

/* The experts with the largest logits, best first, the lowest number first among equals. */
static void topk_row(const Operation *operation, const float *logits, int32_t *topk_ids)
{
    for (int j = 0; j < operation->num_chosen; j++) {
        int best = -1;
        for (int e = 0; e < operation->num_experts; e++) {
            int taken = 0;
            for (int i = 0; i < j; i++)
                taken |= topk_ids[i] == e;
            if (!taken && (best < 0 || logits[e] > logits[best]))
                best = e;
        }
        topk_ids[j] = best;
    }
}

static void softmax_row(
    const Operation *operation, const float *logits, const int32_t *topk_ids, float *topk_weights)
{
    float sum = 0, largest = logits[topk_ids[0]];
    for (int j = 0; j < operation->num_chosen; j++) {
        topk_weights[j] = expf(logits[topk_ids[j]] - largest);
        sum += topk_weights[j];
    }
    if (!operation->option) {
        sum = 0;
        for (int e = 0; e < operation->num_experts; e++)
            sum += expf(logits[e] - largest);
    }
    for (int j = 0; j < operation->num_chosen; j++)
        topk_weights[j] /= sum;
}

void run_route(const Operation *operation, int num_rows)
{
    Routing c = routing_of(operation);
    int chosen = operation->num_chosen, num_choices = num_rows * chosen;
    for (int row = 0; row < num_rows; row++) {
        const float *logits = operation->x + (int64_t)row * operation->x_stride;
        topk_row(operation, logits, c.topk_ids + row * chosen);
        softmax_row(operation, logits, c.topk_ids + row * chosen, c.topk_weights + row * chosen);
    }
    *c.num_active = 0;
    c.offsets[0] = 0;
    for (int e = 0; e < operation->num_experts; e++) {
        int end = c.offsets[e];
        for (int n = 0; n < num_choices; n++)
            if (c.topk_ids[n] == e)
                c.sorted[end++] = n;
        if (end > c.offsets[e])
            c.active[(*c.num_active)++] = e;
        c.offsets[e + 1] = end;
    }
}

int experts_units(const Operation *operation, int queue)
{
    return *routing_of(operation).num_active * linear_pairs(operation, queue);
}

void run_experts(const Operation *operation, int queue, int first, int end)
{
    Routing c = routing_of(operation);
    int pairs = linear_pairs(operation, queue);
    int divisor = operation->option ? operation->num_chosen : 1;
    for (int unit = first; unit < end; unit++) {
        int e = c.active[unit / pairs];
        const WeightPart *parts = operation->parts + e * operation->num_parts;
        for (int i = c.offsets[e]; i < c.offsets[e + 1]; i++)
            run_linear_row(
                operation, parts, queue, unit % pairs, c.sorted[i] / divisor, c.sorted[i]);
    }
}

void run_sum_experts(const Operation *operation, int first, int end)
{
    Routing c = routing_of(operation);
    int chosen = operation->num_chosen;
    for (int row = first; row < end; row++) {
        float *out = operation->out + (int64_t)row * operation->out_stride;
        for (int i = 0; i < operation->width; i++) {
            float sum = 0;
            for (int j = 0; j < chosen; j++) {
                int64_t n = (int64_t)row * chosen + j;
                sum += c.topk_weights[n] * operation->x[n * operation->x_stride + i];
            }
            out[i] += operation->scale * sum;
        }
    }
}
