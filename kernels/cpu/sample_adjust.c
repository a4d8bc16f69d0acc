/* Steps 1 and 2 of the sampling contract: bias, masks and penalties. */
#include "sample.h"

/* A mask has one bit for each id; `adjusted` has room for all bits of the last word. */
static void apply_mask(float *adjusted, int32_t vocab_size, const uint32_t *mask)
{
    for (int32_t i = 0; i < vocab_size; i += 32) {
        uint32_t word = mask[i / 32];
        if (word == UINT32_MAX)
            continue;
        for (int bit = 0; bit < 32; bit += LANES) {
            i32v is_allowed = -(splat_int((int32_t)(word >> bit)) >> lane_numbers() & 1);
            f32v values = load(adjusted + i + bit);
            store(adjusted + i + bit, blend(is_allowed, values, splat(-INFINITY)));
        }
    }
}

static float penalised(float value, const Parameters *parameters, int32_t count)
{
    float repetition = parameters->repetition_penalty;
    value = value > 0 ? value / repetition : value * repetition;
    if (count == 0)
        return value;
    value -= parameters->presence_penalty;
    return value - parameters->frequency_penalty * (float)count;
}

/* True if none of sixteen ids has been seen. */
static int none_seen(const uint8_t *in_prompt, const int32_t *counts)
{
    uint64_t words[2];
    i32v sums = splat_int(0), some;
    memcpy(words, in_prompt, sizeof words);
    for (int i = 0; i < 16; i += LANES) {
        memcpy(&some, counts + i, sizeof some);
        sums += some;
    }
    return !(words[0] | words[1]) && reduce_add_int(sums) == 0;
}

static void penalise(
    float *adjusted,
    int32_t vocab_size,
    const Parameters *parameters,
    const uint8_t *in_prompt,
    const int32_t *counts)
{
    for (int32_t i = 0; i < vocab_size; i++) {
        while (i + 16 <= vocab_size && none_seen(in_prompt + i, counts + i))
            i += 16;
        if (i < vocab_size && (counts[i] | in_prompt[i]))
            adjusted[i] = penalised(adjusted[i], parameters, counts[i]);
    }
}

/* The counts including the drafted ids; `own` has room for them. */
static const int32_t *counts_after(
    const int32_t *counts,
    int32_t vocab_size,
    const int32_t *drafted,
    int32_t num_drafted,
    int32_t *own)
{
    if (num_drafted == 0)
        return counts;
    memcpy(own, counts, sizeof *own * (size_t)vocab_size);
    for (int32_t i = 0; i < num_drafted; i++)
        own[drafted[i]]++;
    return own;
}

void adjust_logits(
    const Scratch *scratch,
    const float *logits,
    int32_t vocab_size,
    const Parameters *parameters,
    const Extras *extras,
    int64_t output_position,
    const int32_t *drafted,
    int32_t num_drafted)
{
    float *adjusted = scratch->adjusted;
    memcpy(adjusted, logits, sizeof *adjusted * (size_t)vocab_size);
    for (int32_t i = 0; i < extras->num_biases; i++)
        adjusted[extras->bias_ids[i]] += extras->bias_values[i];
    if (output_position < extras->min_tokens)
        for (int32_t i = 0; i < extras->num_end_ids; i++)
            adjusted[extras->end_ids[i]] = -INFINITY;
    if (extras->allowed)
        apply_mask(adjusted, vocab_size, extras->allowed);
    if (extras->grammar) {
        int32_t last = extras->num_grammar_rows - 1, words = (vocab_size + 31) / 32;
        int32_t row = num_drafted < last ? num_drafted : last;
        apply_mask(adjusted, vocab_size, extras->grammar + (int64_t)row * words);
    }
    if (extras->counts) {
        const int32_t *counts = counts_after(
            extras->counts, vocab_size, drafted, num_drafted, scratch->ids);
        penalise(adjusted, vocab_size, parameters, extras->in_prompt, counts);
    }
}
