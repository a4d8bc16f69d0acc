/* Experts by lists: ROUTE sorts the choices of the step by expert, so that products read each chosen
 * expert once.  A choice is one row to the kernels: its sums never depend on the others. */
#include "experts.h"
#include "linear.h"
#include "simd.h"

/* What ROUTE leaves: expert and weight of each choice, the choices sorted by expert (those of expert e
 * at starts[e] .. starts[e + 1] - 1), and the experts that have any. */
typedef struct {
    int32_t *expert, *order, *starts, *active, *num_active;
    float *weight;
} Choices;

static Choices choices_of(const Operation *operation)
{
    int32_t *at = operation->choices, capacity = operation->max_choices;
    Choices c = {at, at + capacity, at + 2 * capacity, 0, 0, 0};
    c.active = c.starts + operation->num_experts + 1;
    c.num_active = c.active + operation->num_experts;
    c.weight = (float *)(c.num_active + 1);
    return c;
}

/* The largest logits, best first, the lowest expert first among equals. */
static void choose_row(const Operation *operation, const float *logits, int32_t *expert)
{
    for (int j = 0; j < operation->num_chosen; j++) {
        int best = -1;
        for (int e = 0; e < operation->num_experts; e++) {
            int taken = 0;
            for (int i = 0; i < j; i++)
                taken |= expert[i] == e;
            if (!taken && (best < 0 || logits[e] > logits[best]))
                best = e;
        }
        expert[j] = best;
    }
}

static void weigh_row(
    const Operation *operation, const float *logits, const int32_t *expert, float *weight)
{
    float sum = 0, largest = logits[expert[0]];
    for (int j = 0; j < operation->num_chosen; j++) {
        weight[j] = expf(logits[expert[j]] - largest);
        sum += weight[j];
    }
    if (!operation->option) {
        sum = 0;
        for (int e = 0; e < operation->num_experts; e++)
            sum += expf(logits[e] - largest);
    }
    for (int j = 0; j < operation->num_chosen; j++)
        weight[j] /= sum;
}

void run_route(const Operation *operation, int num_rows)
{
    Choices c = choices_of(operation);
    int chosen = operation->num_chosen, num_choices = num_rows * chosen;
    for (int row = 0; row < num_rows; row++) {
        const float *logits = operation->x + (int64_t)row * operation->x_stride;
        choose_row(operation, logits, c.expert + row * chosen);
        weigh_row(operation, logits, c.expert + row * chosen, c.weight + row * chosen);
    }
    *c.num_active = 0;
    c.starts[0] = 0;
    for (int e = 0; e < operation->num_experts; e++) {
        int end = c.starts[e];
        for (int n = 0; n < num_choices; n++)
            if (c.expert[n] == e)
                c.order[end++] = n;
        if (end > c.starts[e])
            c.active[(*c.num_active)++] = e;
        c.starts[e + 1] = end;
    }
}

int experts_units(const Operation *operation, int queue)
{
    return *choices_of(operation).num_active * linear_pairs(operation, queue);
}

void experts_run(const Operation *operation, int queue, int first, int end)
{
    Choices c = choices_of(operation);
    int pairs = linear_pairs(operation, queue);
    int divisor = operation->by_row ? operation->num_chosen : 1;
    for (int unit = first; unit < end; unit++) {
        int e = c.active[unit / pairs];
        const Part *parts = operation->parts + e * operation->num_parts;
        for (int i = c.starts[e]; i < c.starts[e + 1]; i++)
            linear_run_row(
                operation, parts, queue, unit % pairs, c.order[i] / divisor, c.order[i]);
    }
}

void run_weigh(const Operation *operation, int first, int end)
{
    Choices c = choices_of(operation);
    int chosen = operation->num_chosen;
    for (int row = first; row < end; row++) {
        float *out = operation->out + (int64_t)row * operation->out_stride;
        for (int i = 0; i < operation->width; i++) {
            float sum = 0;
            for (int j = 0; j < chosen; j++) {
                int64_t n = (int64_t)row * chosen + j;
                sum += c.weight[n] * operation->x[n * operation->x_stride + i];
            }
            out[i] += operation->scale * sum;
        }
    }
}
