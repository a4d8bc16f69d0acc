/* The sampling contract of backend/sampling/reference_sampler.py, to the bit.  Mirrored by backend/cpu/sampling.py. */
#ifndef SAMPLE_H
#define SAMPLE_H

#include <stdint.h>

#include "plan.h"
#include "sample_select.h"

enum { FAILED = -1 };

/* sampling_table.py's PARAMETERS */
typedef struct {
    uint64_t seed;
    int64_t top_p, typical_p, min_p;
    uint32_t choice;
    int32_t top_k;
    float temperature, repetition_penalty, presence_penalty, frequency_penalty;
    int32_t num_logprobs, has_extras;
} Parameters;

/* Its ADDRESSES: of the arrays of Extras, null where there is none. */
typedef struct {
    const int32_t *bias_ids;
    const float *bias_values;
    const int32_t *end_ids;
    const uint32_t *allowed, *grammar; /* bit masks; of grammar a line for each drafted row */
    const uint8_t *in_prompt;
    int32_t *counts;
    int32_t num_biases, num_end_ids, min_tokens, num_grammar_rows;
} Extras;

/* One call: R rows of logits, and what becomes of each. */
typedef struct {
    const float *logits;
    int64_t stride; /* floats from a row to the next */
    int32_t vocab_size, num_rows;
    const Parameters *parameters; /* by slot, as extras */
    const Extras *extras;
    const int32_t *slots, *targets, *drafts;
    const int64_t *output_positions;
    uint8_t *scratch; /* [thread] of llmsrv_sample_scratch_bytes */
    int32_t *ids;
    float *logprobs;
    int32_t num_alternatives; /* columns of the following, at least every row's num_logprobs */
    int32_t *alternative_ids;
    float *alternative_logprobs;
} Sampling;

/* Steps 1 and 2 of the contract: logits with bias, masks and penalties, at `adjusted`.  drafted: the
 * ids that are supposed to be put out in this step before the row. */
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
