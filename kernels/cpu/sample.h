/* The sampling contract of backend/sampling/reference_sampler.py, bit for bit.  Mirrored by
 * backend/cpu/sampling.py. */
#ifndef SAMPLE_H
#define SAMPLE_H

#include <stdint.h>

#include "plan.h"
#include "sample_select.h"

enum { FAILED = -1 };

/* PARAMETERS of backend/sampling/table.py */
typedef struct {
    uint64_t seed;
    int64_t top_p, typical_p, min_p;
    uint32_t choice;
    int32_t top_k;
    float temperature, repetition_penalty, presence_penalty, frequency_penalty;
    int32_t num_logprobs, has_extras;
} Parameters;

/* ADDRESSES of backend/cpu/sampling.py: the arrays of Extras, null if absent. */
typedef struct {
    const int32_t *bias_ids;
    const float *bias_values;
    const int32_t *end_ids;
    const uint32_t *allowed, *grammar; /* bit masks; grammar has a line for each drafted row */
    const uint8_t *in_prompt;
    int32_t *counts;
    int32_t num_biases, num_end_ids, min_tokens, num_grammar_rows;
} Extras;

/* One call: R rows of logits, and the results of each. */
typedef struct {
    const float *logits;
    int64_t stride; /* floats from one row to the next */
    int32_t vocab_size, num_rows;
    const Parameters *parameters; /* indexed by slot, like extras */
    const Extras *extras;
    const int32_t *slots, *targets, *drafts;
    const int64_t *output_positions;
    uint8_t *scratch; /* [thread][llmsrv_sample_scratch_bytes] */
    int32_t *ids;
    float *logprobs;
    int32_t *ranks; /* of ids, from 1; 0 where num_logprobs is negative */
    int32_t num_alternatives; /* columns of the next two, at least every row's num_logprobs */
    int32_t *alternative_ids;
    float *alternative_logprobs;
} Sampling;

/* Steps 1 and 2 of the contract: writes logits with bias, masks and penalties to `adjusted`.
 * drafted: the draft tokens that precede the row in this step. */
void adjust_logits(
    const Scratch *scratch,
    const float *logits,
    int32_t vocab_size,
    const Parameters *parameters,
    const Extras *extras,
    int64_t output_position,
    const int32_t *drafted,
    int32_t num_drafted);

#endif
