/* The sampling contract of backend/sampling.py, to the bit: floats are rounded operation by
 * operation as numpy does, and everything after exp is an integer.
 *
 * Nothing is sorted.  What top_k and top_p keep is all above a threshold and the first few that equal
 * it; the threshold is found by bisection, on the bits of x and on the weights. */
#include "sample.h"

#include "simd.h"

enum { WEIGHT_BITS = 40, FRACTION_BITS = 32, FAILED = -1, STRIDE = 256 };

typedef int64_t i64x16 __attribute__((vector_size(128)));

/* Arrays over the vocabulary, padded to STRIDE with ids that are never drawn. */
typedef struct {
    int32_t size; /* padded */
    float *x;
    int64_t *weights, *likely, *sums; /* sums: of each STRIDE weights */
} Scratch;

static int32_t padded(int32_t size) { return (size + STRIDE - 1) / STRIDE * STRIDE; }

int64_t sample_scratch_bytes(int32_t vocab_size)
{
    int64_t size = padded(vocab_size);
    return size * (int64_t)(sizeof(float) + 2 * sizeof(int64_t)) + size / STRIDE * 8;
}

static Scratch scratch_at(void *memory, int32_t vocab_size)
{
    Scratch scratch = {padded(vocab_size), 0, memory, 0, 0};
    scratch.likely = scratch.weights + scratch.size;
    scratch.sums = scratch.likely + scratch.size;
    scratch.x = (float *)(scratch.sums + scratch.size / STRIDE);
    return scratch;
}

/* ---- The largest logit */

static int has_any(i32x16 mask) { return sum_int(mask) != 0; }

INLINE f32x16 load_padded(const float *p, int left)
{
    f32x16 x = splat(-INFINITY);
    if (left >= 16)
        return load(p);
    memcpy(&x, p, sizeof(float) * (size_t)(left > 0 ? left : 0));
    return x;
}

/* The lowest id of the largest logit, or FAILED: a NaN, or the largest is infinite. */
static int32_t largest_id(const float *logits, int32_t vocab_size)
{
    f32x16 largest = splat(-INFINITY);
    i32x16 is_nan = splat_int(0);
    for (int32_t i = 0; i < vocab_size; i += 16) {
        f32x16 x = load_padded(logits + i, vocab_size - i);
        is_nan |= x != x;
        largest = max16(largest, x);
    }
    float best = largest16(largest);
    if (has_any(is_nan) || !(fabsf(best) < INFINITY))
        return FAILED;
    for (int32_t i = 0; i < vocab_size; i += 16)
        if (has_any(load_padded(logits + i, vocab_size - i) == splat(best)))
            for (;; i++)
                if (logits[i] == best)
                    return i;
    return FAILED;
}

/* ---- Weights */

/* floor(exp(x) * 2^40), and 0 below -28. */
INLINE i64x16 weights_of(f32x16 x)
{
    f32x16 within = max16(x, splat(-28.0f));
    i32x16 n = to_nearest(within * splat(0x1.715476p+0f));
    f32x16 whole = to_float(n);
    f32x16 r = (within - whole * splat(0x1.62e4p-1f)) - whole * splat(0x1.7f7d1cp-20f);
    f32x16 y = splat(0x1.6a23d0p-10f);
    y = y * r + splat(0x1.123a20p-7f);
    y = y * r + splat(0x1.5558f2p-5f);
    y = y * r + splat(0x1.555492p-3f);
    y = y * r + splat(0x1.fffffcp-2f);
    y = y * r + splat(1.0f);
    y = y * r + splat(1.0f);
    y = y * (f32x16)((n + (127 + WEIGHT_BITS)) << 23);
    y = choose(x >= splat(-28.0f), y, splat(0));
    return __builtin_convertvector(y, i64x16);
}

static void fill_x(const Scratch *s, const float *logits, int32_t vocab_size, float best, float t)
{
    for (int32_t i = 0; i < s->size; i += 16)
        store(s->x + i, (load_padded(logits + i, vocab_size - i) - splat(best)) / splat(t));
}

static void fill_weights(const Scratch *s)
{
    for (int32_t i = 0; i < s->size; i += 16) {
        i64x16 weights = weights_of(load(s->x + i));
        memcpy(s->weights + i, &weights, sizeof weights);
    }
}

static int64_t fill_sums(const Scratch *s)
{
    int64_t total = 0;
    for (int32_t i = 0; i < s->size; i += STRIDE) {
        int64_t sum = 0;
        for (int j = 0; j < STRIDE; j++)
            sum += s->weights[i + j];
        s->sums[i / STRIDE] = sum;
        total += sum;
    }
    return total;
}

/* ---- What is kept */

static int32_t count_above(const Scratch *s, float threshold)
{
    i32x16 count = splat_int(0);
    for (int32_t i = 0; i < s->size; i += 16)
        count -= load(s->x + i) > splat(threshold);
    return sum_int(count);
}

/* x below 0 with these bits, which grow as x falls. */
static float negative_of(uint32_t bits)
{
    float x;
    bits |= 0x80000000u;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Makes all x but the k largest minus infinity, of equals the first kept. */
static void keep_top_k(const Scratch *s, int32_t k)
{
    uint32_t low = 0, high = 0x41e00000u; /* 0 and -28, below which weights are 0 anyway */
    if (count_above(s, -28.0f) < k)
        return;
    /* The least bits such that fewer than k are above. */
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (count_above(s, negative_of(middle + 1)) >= k)
            high = middle;
        else
            low = middle + 1;
    }
    float kth = negative_of(low);
    int32_t equals = k - count_above(s, kth);
    for (int32_t i = 0; i < s->size; i++)
        if (!(s->x[i] > kth) && !(s->x[i] == kth && equals-- > 0))
            s->x[i] = -INFINITY;
}

static int64_t sum_from(const int64_t *weights, int32_t count, int64_t least)
{
    int64_t sum = 0;
    for (int32_t i = 0; i < count; i++)
        sum += weights[i] >= least ? weights[i] : 0;
    return sum;
}

/* The least integer that is `fraction` / 2^32 of the total, at least 1. */
static int64_t share(int64_t total, int64_t fraction)
{
    __int128 product = (__int128)total * fraction;
    int64_t goal = (int64_t)((product + (((__int128)1 << FRACTION_BITS) - 1)) >> FRACTION_BITS);
    return goal > 1 ? goal : 1;
}

/* Makes all weights 0 but the largest, until they reach the goal; of equals the first are kept. */
static void keep_top_p(const Scratch *s, int64_t total, int64_t fraction)
{
    int64_t goal = share(total, fraction), least = (total - goal) / s->size;
    int32_t count = 0;
    /* All weights below `least` together weigh less than total - goal. */
    for (int32_t i = 0; i < s->size; i++) {
        s->likely[count] = s->weights[i];
        count += s->weights[i] >= least && s->weights[i] > 0;
    }
    int64_t low = 1, high = (int64_t)1 << WEIGHT_BITS; /* the largest such that the sum is enough */
    while (low < high) {
        int64_t middle = low + (high - low + 1) / 2;
        if (sum_from(s->likely, count, middle) >= goal)
            low = middle;
        else
            high = middle - 1;
    }
    int64_t missing = goal - sum_from(s->likely, count, low + 1);
    for (int32_t i = 0; i < s->size; i++) {
        int64_t weight = s->weights[i];
        if (weight > low)
            continue;
        if (weight == low && missing > 0)
            missing -= weight;
        else
            s->weights[i] = 0;
    }
}

static void keep_min_p(const Scratch *s, int64_t least)
{
    for (int32_t i = 0; i < s->size; i++)
        s->weights[i] = s->weights[i] >= least ? s->weights[i] : 0;
}

/* ---- The draw */

/* Philox4x32-10, philox.py's uniform_bits. */
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

static int32_t draw(const Scratch *s, uint64_t bits)
{
    int64_t total = fill_sums(s);
    int64_t target = (int64_t)((unsigned __int128)bits * (uint64_t)total >> 64), sum = 0;
    int32_t i = 0;
    while (sum + s->sums[i / STRIDE] <= target) {
        sum += s->sums[i / STRIDE];
        i += STRIDE;
    }
    while ((sum += s->weights[i]) <= target)
        i++;
    return i;
}

int32_t sample_row(
    const float *logits,
    int32_t vocab_size,
    const Parameters *parameters,
    int64_t output_position,
    void *memory)
{
    int32_t best = largest_id(logits, vocab_size);
    if (best == FAILED || parameters->temperature == 0)
        return best;
    Scratch s = scratch_at(memory, vocab_size);
    fill_x(&s, logits, vocab_size, logits[best], parameters->temperature);
    if (parameters->top_k > 0)
        keep_top_k(&s, parameters->top_k);
    fill_weights(&s);
    if (parameters->top_p < (int64_t)1 << FRACTION_BITS)
        keep_top_p(&s, fill_sums(&s), parameters->top_p);
    if (parameters->min_p > 0)
        keep_min_p(&s, parameters->min_p);
    return draw(&s, uniform_bits(parameters->seed, parameters->choice, output_position));
}
