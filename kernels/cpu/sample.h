/* The sampling contract of backend/sampling.py, to the bit. */
#ifndef SAMPLE_H
#define SAMPLE_H

#include <stdint.h>

/* sampling.py's PARAMETERS */
typedef struct {
    uint64_t seed;
    int64_t top_p, typical_p, min_p;
    uint32_t choice;
    int32_t top_k;
    float temperature, repetition_penalty, presence_penalty, frequency_penalty;
    int32_t num_logprobs, has_extras;
} Parameters;

int64_t sample_scratch_bytes(int32_t vocab_size);

/* The id drawn from the logits of one row, or -1; steps 3 to 9 of the contract, less 8. */
int32_t sample_row(
    const float *logits,
    int32_t vocab_size,
    const Parameters *parameters,
    int64_t output_position,
    void *scratch);

#endif
