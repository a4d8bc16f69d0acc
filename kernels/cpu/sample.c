/* The sampling contract: steps 3 to 9, log-probabilities, and the rows of a step.
 *
 * Floats are rounded operation by operation, as numpy does; everything after exp is an integer. */
#include "sample.h"

#include <stdlib.h>

#include "threads.h"
#include "sample_select.h"
#include "sample_sort.h"

enum { WEIGHT_BITS = 40, FRACTION_BITS = 32, SURPRISAL_BITS = 20 };

#define ONE ((int64_t)1 << WEIGHT_BITS)
#define MIN_X -28.0f /* weights of smaller x are 0 */

/* Half of a vector's lanes. */
typedef int64_t i64h __attribute__((vector_size(4 * LANES)));
typedef float f32h __attribute__((vector_size(2 * LANES)));
enum { HALF = LANES / 2 };

/* ---- Filters */

/* exp(x) * 2^40 for x from -28 to 0. */
INLINE f32v scaled_exp(f32v x)
{
    i32v n = round_to_int(x * splat(0x1.715476p+0f));
    f32v whole = to_float(n);
    f32v r = (x - whole * splat(0x1.62e4p-1f)) - whole * splat(0x1.7f7d1cp-20f);
    f32v y = splat(0x1.6a23d0p-10f);
    y = y * r + splat(0x1.123a20p-7f);
    y = y * r + splat(0x1.5558f2p-5f);
    y = y * r + splat(0x1.555492p-3f);
    y = y * r + splat(0x1.fffffcp-2f);
    y = y * r + splat(1.0f);
    y = y * r + splat(1.0f);
    return y * (f32v)((n + (127 + WEIGHT_BITS)) << 23);
}

/* Half of the lanes as integers. */
INLINE i64h weights_of(f32v y, int half)
{
    f32h some;
    memcpy(&some, (const char *)&y + sizeof some * half, sizeof some);
    return __builtin_convertvector(some, i64h);
}

static void fill_weights(Scratch *s)
{
    for (int32_t i = 0; i < s->count; i += LANES) {
        f32v y = scaled_exp(load_partial(s->x + i, s->count - i));
        i64h low = weights_of(y, 0), high = weights_of(y, 1);
        memcpy(s->weights + i, &low, sizeof low);
        memcpy(s->weights + i + HALF, &high, sizeof high);
    }
    truncate_candidates(s, s->count);
}

INLINE int64_t sum_lanes(i64h x)
{
    int64_t sum = 0;
    UNROLL for (int i = 0; i < HALF; i++) sum += x[i];
    return sum;
}

INLINE i64h load_weights(const Scratch *s, int32_t i)
{
    i64h weights;
    memcpy(&weights, s->weights + i, sizeof weights);
    return weights;
}

/* The sum of all weights that are at least `least`. */
static int64_t sum_from(const Scratch *s, int64_t least)
{
    i64h sums = {0};
    for (int32_t i = 0; i < s->count; i += HALF) {
        i64h weights = load_weights(s, i);
        sums += weights & (weights >= least);
    }
    return sum_lanes(sums);
}

/* The least integer that is at least fraction / 2^32 of the total; at least 1. */
static int64_t ceil_fraction(int64_t total, int64_t fraction)
{
    __int128 product = (__int128)total * fraction;
    int64_t goal = (int64_t)((product + (((__int128)1 << FRACTION_BITS) - 1)) >> FRACTION_BITS);
    return goal > 1 ? goal : 1;
}

static void keep_weights_from(Scratch *s, int64_t least)
{
    int32_t count = 0;
    for (int32_t i = 0; i < s->count; i += HALF) {
        if (sum_lanes(load_weights(s, i) >= least) == 0)
            continue;
        for (int32_t j = i; j < i + HALF && j < s->count; j++) {
            int is_kept = s->weights[j] >= least;
            move_candidate(s, j, count);
            count += is_kept;
        }
    }
    truncate_candidates(s, count);
}

/* Fills `sums`, and returns the sum of all weights. */
static int64_t fill_sums(const Scratch *s, const LogitRow *row)
{
    int64_t total = 0;
    for (int32_t i = 0; i < s->size; i += STRIDE) {
        i64h sums = {0};
        for (int32_t j = i; j < i + STRIDE; j += LANES) {
            f32v x = scaled_logits(row, j);
            f32v y = scaled_exp(max_v(x, splat(MIN_X)));
            y = blend(x >= splat(MIN_X), y, splat(0));
            sums += weights_of(y, 0) + weights_of(y, 1);
        }
        s->sums[i / STRIDE] = sum_lanes(sums);
        total += s->sums[i / STRIDE];
    }
    return total;
}

static void gather_weights(Scratch *s, const LogitRow *row, float least_x)
{
    gather_candidates(s, row, 0, s->size, least_x);
    fill_weights(s);
}

/* Keeps all ids whose weight is at least `least`, and few others: exp is accurate enough. */
static void gather_weights_from(Scratch *s, const LogitRow *row, int64_t least)
{
    float x = logf((float)least * 0x1p-40f) - 0.01f;
    gather_weights(s, row, x > MIN_X ? x : MIN_X);
}

/* Keeps at least the ids with the largest weights that together reach the goal. */
static void gather_likely(Scratch *s, const LogitRow *row, int64_t goal)
{
    for (int64_t least = ONE >> 6; least >= ONE >> 16; least >>= 5) {
        gather_weights_from(s, row, least);
        if (sum_from(s, least) >= goal)
            return;
    }
    gather_weights(s, row, MIN_X);
}

/* Weights have at most 24 significant bits, so floats hold them exactly. */
static void keep_until(Scratch *s, int64_t goal)
{
    for (int32_t i = 0; i < s->count; i++)
        s->keys[i] = key_of((float)s->weights[i]);
    keep_smallest(s, s->weights, goal);
}

static void keep_typical_p(Scratch *s, int64_t fraction)
{
    int64_t surprisals = 0, total = sum_from(s, 0);
    for (int32_t i = 0; i < s->count; i++) {
        s->keys[i] = (uint32_t)(-s->x[i] * (float)(1 << SURPRISAL_BITS));
        surprisals += s->weights[i] * s->keys[i] >> 24;
    }
    int32_t mean = (int32_t)(surprisals / (total >> 24));
    for (int32_t i = 0; i < s->count; i++)
        s->keys[i] = (uint32_t)abs((int32_t)s->keys[i] - mean);
    keep_smallest(s, s->weights, ceil_fraction(total, fraction));
}

/* ---- The draw */

/* Philox4x32-10, as uniform_bits of backend/sampling/philox.py. */
static uint64_t uniform_bits(uint64_t seed, uint32_t choice, int64_t position)
{
    uint32_t c[4] = {choice, (uint32_t)position, (uint32_t)((uint64_t)position >> 32), 0};
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t product0 = 0xD2511F53ull * c[0], product1 = 0xCD9E8D57ull * c[2];
        c[0] = (uint32_t)(product1 >> 32) ^ c[1] ^ k0;
        c[1] = (uint32_t)product1;
        c[2] = (uint32_t)(product0 >> 32) ^ c[3] ^ k1;
        c[3] = (uint32_t)product0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return (uint64_t)c[1] << 32 | c[0];
}

/* A uniform random integer from 0 to total - 1. */
static int64_t target_of(uint64_t bits, int64_t total)
{
    return (int64_t)((unsigned __int128)bits * (uint64_t)total >> 64);
}

/* The first id at which the running sum of the kept weights exceeds the target. */
static int32_t id_at(const Scratch *s, int64_t target)
{
    int32_t i = 0;
    while (s->weights[i] <= target)
        target -= s->weights[i++];
    return s->ids[i];
}

static int32_t draw_from_all(Scratch *s, const LogitRow *row, uint64_t bits)
{
    int64_t target = target_of(bits, fill_sums(s, row));
    int32_t stride = 0;
    while (s->sums[stride] <= target)
        target -= s->sums[stride++];
    gather_candidates(s, row, stride * STRIDE, (stride + 1) * STRIDE, MIN_X);
    fill_weights(s);
    return id_at(s, target);
}

static int32_t draw(
    Scratch *s, const LogitRow *row, const Parameters *parameters, int64_t output_position)
{
    const int64_t all = (int64_t)1 << FRACTION_BITS;
    int64_t total = 0;
    if (row->temperature == 0)
        return argmax(s, row);
    uint64_t bits = uniform_bits(parameters->seed, parameters->choice, output_position);
    if (parameters->top_k > 0) {
        float x = (kth_largest_bound(s, parameters->top_k) - row->best) / row->temperature;
        gather_candidates(s, row, 0, s->size, x > MIN_X ? x : MIN_X);
        keep_top_k(s, parameters->top_k);
        fill_weights(s);
        total = sum_from(s, 0);
    } else if (parameters->top_p < all) {
        total = fill_sums(s, row);
        gather_likely(s, row, ceil_fraction(total, parameters->top_p));
    } else if (parameters->min_p > 0 || parameters->typical_p < all) {
        gather_weights_from(s, row, parameters->min_p);
    } else {
        return draw_from_all(s, row, bits);
    }
    if (parameters->top_p < all)
        keep_until(s, ceil_fraction(total, parameters->top_p));
    if (parameters->min_p > 0)
        keep_weights_from(s, parameters->min_p);
    if (parameters->typical_p < all)
        keep_typical_p(s, parameters->typical_p);
    return id_at(s, target_of(bits, sum_from(s, 0)));
}

/* ---- Log-probabilities */

/* The logarithm of the sum of exp(logit - best) over the vocabulary. */
static double log_sum_exp(const Scratch *s, const LogitRow *row)
{
    return log((double)fill_sums(s, row) * 0x1p-40);
}

static float logprob_of(float logit, float best, double log_sum)
{
    return (float)((double)(logit - best) - log_sum);
}

/* The place of an id, from 1, with the largest logit first, among equals the lowest id first. */
static int32_t rank_of(const LogitRow *row, int32_t id)
{
    const float *logits = row->logits, logit = logits[id];
    int32_t rank = 1;
    for (int32_t i = 0; i < id; i++)
        rank += logits[i] >= logit;
    for (int32_t i = id + 1; i < row->vocab_size; i++)
        rank += logits[i] > logit;
    return rank;
}

/* Reports the k largest log-probabilities, the largest first, among equals the lowest id first. */
static void report_top_logprobs(
    Scratch *s, const LogitRow *row, int32_t k, double log_sum, int32_t *ids, float *logprobs)
{
    const float *logits = row->logits;
    LogitRow as_they_are = {logits, row->vocab_size, 0, 1};
    gather_candidates(s, &as_they_are, 0, s->size, kth_largest_bound(s, k));
    keep_top_k(s, k);
    for (int32_t i = 0; i < s->count; i++)
        ids[i] = s->ids[i];
    sort_ids(logits, ids, s->count);
    for (int32_t i = 0; i < s->count; i++)
        logprobs[i] = logprob_of(logits[ids[i]], row->best, log_sum);
}

/* ---- The rows of a step */

/* Samples an id from a row whose logits are valid. */
static int32_t sample_id(const Sampling *sampling, int32_t r, LogitRow row, Scratch *s)
{
    const int32_t *draft = sampling->drafts + r;
    int32_t slot = sampling->slots[r], num_drafted = 0;
    const Parameters *parameters = &sampling->parameters[slot];
    int64_t output_position = sampling->output_positions[r];
    row.temperature = parameters->temperature;
    if (parameters->has_extras) {
        while (draft[-num_drafted] >= 0)
            num_drafted++;
        adjust_logits(s, row.logits, row.vocab_size, parameters, &sampling->extras[slot],
                      output_position, draft - num_drafted + 1, num_drafted);
        row.logits = s->adjusted;
        row.best = max_logit(s, row.logits, row.vocab_size);
        if (isnan(row.best))
            return FAILED;
    }
    return draw(s, &row, parameters, output_position);
}

static void sample_row(const Sampling *sampling, int32_t r, Scratch *s)
{
    int32_t target = sampling->targets[r];
    int32_t num_logprobs = sampling->parameters[sampling->slots[r]].num_logprobs;
    LogitRow row = {sampling->logits + r * sampling->stride, sampling->vocab_size, 0, 1};
    double log_sum = 0;

    sampling->ids[r] = FAILED;
    sampling->logprobs[r] = NAN;
    sampling->ranks[r] = 0;
    row.best = max_logit(s, row.logits, row.vocab_size);
    if (isnan(row.best))
        return;
    if (num_logprobs >= 0)
        log_sum = log_sum_exp(s, &row);
    if (num_logprobs > 0) {
        int64_t at = (int64_t)r * sampling->num_alternatives;
        report_top_logprobs(s, &row, num_logprobs, log_sum, sampling->alternative_ids + at,
                            sampling->alternative_logprobs + at);
    }
    int32_t id = target >= 0 ? target : sample_id(sampling, r, row, s);
    sampling->ids[r] = id;
    if (id == FAILED || num_logprobs < 0)
        return;
    sampling->logprobs[r] = logprob_of(row.logits[id], row.best, log_sum);
    sampling->ranks[r] = rank_of(&row, id);
}

/* Counts the generated tokens: the ids of rows whose drafts before them were all sampled. */
static void count_ids(const Sampling *s)
{
    int is_reached = 0;
    for (int32_t row = 0; row < s->num_rows; row++) {
        const Extras *extras = &s->extras[s->slots[row]];
        int32_t draft = s->drafts[row], id = s->ids[row];
        is_reached = id != FAILED && (draft < 0 || (is_reached && s->ids[row - 1] == draft));
        if (is_reached && s->targets[row] < 0 && extras->counts)
            extras->counts[id]++;
    }
}

typedef struct {
    const Sampling *sampling;
    int32_t num_threads;
} Rows;

static int rows_are_few(void *context, int task)
{
    (void)task;
    return ((const Rows *)context)->sampling->num_rows <= 1;
}

static int32_t first_row(const Rows *rows, int queue)
{
    return (int32_t)((int64_t)rows->sampling->num_rows * queue / rows->num_threads);
}

static int rows_of_queue(void *context, int task, int queue)
{
    (void)task;
    return first_row(context, queue + 1) - first_row(context, queue);
}

static void sample_rows(void *context, int task, int queue, int first, int end, int thread)
{
    const Sampling *sampling = ((const Rows *)context)->sampling;
    int32_t before = first_row(context, queue);
    int64_t size = scratch_bytes(sampling->vocab_size);
    Scratch scratch = scratch_at(sampling->scratch + thread * size, sampling->vocab_size);
    (void)task;
    for (int32_t row = before + first; row < before + end; row++)
        sample_row(sampling, row, &scratch);
}

void llmsrv_sample(const Plan *plan, const Sampling *sampling)
{
    Rows rows = {sampling, plan->num_threads};
    Job job = {1, &rows, rows_are_few, rows_of_queue, sample_rows, plan->heartbeat};
    pool_run(plan->pool, &job);
    count_ids(sampling);
}

int64_t llmsrv_sample_scratch_bytes(int32_t vocab_size) { return scratch_bytes(vocab_size); }
