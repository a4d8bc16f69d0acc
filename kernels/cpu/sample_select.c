/* Selects candidates without sorting.
 *
 * A filter keeps all ids whose key is below a threshold, and the first few whose key equals it.
 * The threshold is found digit by digit, the highest first (radix_threshold).  The largest logit of
 * each stride of ids rules out most ids before top_k looks at them. */
#include "sample_select.h"

enum { DIGIT_BITS = 11 };

/* ---- Scratch */

static int32_t padded(int32_t size) { return (size + STRIDE - 1) / STRIDE * STRIDE; }

int64_t scratch_bytes(int32_t vocab_size)
{
    int64_t size = padded(vocab_size), strides = size / STRIDE;
    int64_t words = size + strides, floats = 4 * size + strides;
    return (words * 8 + floats * 4 + 63) / 64 * 64;
}

Scratch scratch_at(uint8_t *memory, int32_t vocab_size)
{
    Scratch s = {.size = padded(vocab_size), .weights = (int64_t *)memory};
    s.sums = s.weights + s.size;
    s.adjusted = (float *)(s.sums + s.size / STRIDE);
    s.x = s.adjusted + s.size;
    s.ids = (int32_t *)(s.x + s.size);
    s.keys = (uint32_t *)(s.ids + s.size);
    s.maxima = (float *)(s.keys + s.size);
    return s;
}

/* ---- The largest logits */

static int has_any(i32v mask) { return reduce_add_int(mask) != 0; }

float max_logit(const Scratch *s, const float *logits, int32_t vocab_size)
{
    float best = -INFINITY;
    i32v is_nan = splat_int(0);
    for (int32_t i = 0; i < s->size; i += STRIDE) {
        f32v largest = splat(-INFINITY);
        for (int32_t j = i; j < i + STRIDE; j += LANES) {
            f32v x = load_padded(logits + j, vocab_size - j);
            is_nan |= x != x;
            largest = max_v(largest, x);
        }
        float maximum = reduce_max(largest);
        s->maxima[i / STRIDE] = maximum;
        best = maximum > best ? maximum : best;
    }
    return has_any(is_nan) || !(fabsf(best) < INFINITY) ? NAN : best;
}

int32_t argmax(const Scratch *s, const LogitRow *row)
{
    int32_t i = 0;
    while (s->maxima[i / STRIDE] != row->best)
        i += STRIDE;
    while (row->logits[i] != row->best)
        i++;
    return i;
}

/* ---- Keeping the smallest keys */

/* The least key such that the amounts (1 each if null) of all keys up to it reach the goal.
 * Subtracts the amounts of smaller keys from *goal. */
static uint32_t radix_threshold(
    const uint32_t *keys, const int64_t *amounts, int32_t count, int64_t *goal)
{
    int64_t sums[1 << DIGIT_BITS];
    uint32_t known = 0, mask = 0;
    for (int shift = 2 * DIGIT_BITS; shift >= 0; shift -= DIGIT_BITS) {
        memset(sums, 0, sizeof sums);
        for (int32_t i = 0; i < count; i++)
            if ((keys[i] & mask) == known)
                sums[keys[i] >> shift & ((1 << DIGIT_BITS) - 1)] += amounts ? amounts[i] : 1;
        uint32_t digit = 0;
        while (sums[digit] < *goal)
            *goal -= sums[digit++];
        known |= digit << shift;
        mask |= ((1u << DIGIT_BITS) - 1) << shift;
    }
    return known;
}

void keep_smallest(Scratch *s, const int64_t *amounts, int64_t goal)
{
    uint32_t threshold = radix_threshold(s->keys, amounts, s->count, &goal);
    int32_t count = 0;
    for (int32_t i = 0; i < s->count; i++) {
        int is_last = s->keys[i] == threshold, is_kept = s->keys[i] < threshold;
        is_kept |= is_last & (goal > 0);
        goal -= is_last ? (amounts ? amounts[i] : 1) : 0;
        move_candidate(s, i, count);
        count += is_kept; /* no branch: the CPU could not predict it */
    }
    truncate_candidates(s, count);
}

float kth_largest_bound(const Scratch *s, int32_t k)
{
    int32_t count = s->size / STRIDE;
    int64_t goal = k;
    if (k > count)
        return -INFINITY;
    for (int32_t i = 0; i < count; i++)
        s->keys[i] = key_of(s->maxima[i]);
    uint32_t key = radix_threshold(s->keys, 0, count, &goal);
    float bound;
    key = key >> 31 ? key : ~key & 0x7fffffff;
    memcpy(&bound, &key, sizeof bound);
    return bound;
}

void gather_candidates(Scratch *s, const LogitRow *row, int32_t first, int32_t end, float least)
{
    int32_t count = 0;
    for (int32_t i = first; i < end; i += LANES) {
        float maximum = s->maxima[i / STRIDE];
        if (i % STRIDE == 0 && !((maximum - row->best) / row->temperature >= least)) {
            i += STRIDE - LANES;
            continue;
        }
        f32v x = scaled_logits(row, i);
        int num_kept = -reduce_add_int(x >= splat(least));
        if (num_kept == LANES) {
            i32v ids = splat_int(i) + lane_numbers();
            store(s->x + count, x);
            memcpy(s->ids + count, &ids, sizeof ids);
            count += LANES;
        } else if (num_kept) {
            for (int lane = 0; lane < LANES; lane++) {
                s->x[count] = x[lane];
                s->ids[count] = i + lane;
                count += x[lane] >= least;
            }
        }
    }
    s->count = count;
}

void keep_top_k(Scratch *s, int32_t k)
{
    if (k >= s->count)
        return;
    for (int32_t i = 0; i < s->count; i++)
        s->keys[i] = key_of(s->x[i]);
    keep_smallest(s, 0, k);
}
