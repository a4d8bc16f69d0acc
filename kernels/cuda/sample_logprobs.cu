/* Sampling, last: what the host needs for log-probabilities, of the rows' logits as they are.
 *
 *     sum = sum of the weights at temperature 1;  rank = 1 + number of ids with a larger logit, or
 *     an equal one and a lower id;  alternatives: the num_logprobs ids with the largest logits, the
 *     lowest ids of a tie, in any order
 *
 *     grid                 (chunks of the vocabulary, rows), THREADS threads
 *     alternatives         [rows][num_alternatives]
 *     alternative_logits   [rows][num_alternatives] float32
 *     others as in sample_draw, which must have run
 *
 * The host takes the logarithm, so that it is the reference's to the last bit. */
#include "sample_block.cuh"

/* Compares logits, and counts ids. */
struct LargestFirst {
    __device__ __forceinline__ unsigned key(float logit) const { return ~ascending_key(logit); }

    __device__ __forceinline__ Mass amount(int, float) const { return 1; }
};

/* True if an id comes before another one, by the larger logit or by the lower id. */
__device__ __forceinline__ bool comes_before(float logit, int id, float other, int other_id)
{
    return logit > other || (logit == other && id < other_id);
}

/* Adds what the block's chunk has to the row's total, rank and bins, and fills `maxima`. */
__device__ __forceinline__ void measure_chunk(
    Shared &shared, const LogitRow &row, State *state, Mass *bins, float *maxima, int id)
{
    int num_groups = (row.vocab_size + GROUP - 1) / GROUP;
    bool has_alternatives = row.row->parameters.num_logprobs > 0;
    float logit = row.logits[id], max = state->raw_max;
    Mass total = 0, rank = 0;
    clear_histogram(shared);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < CHUNK / GROUP; i += WARPS) {
        int group = blockIdx.x * (CHUNK / GROUP) + i + threadIdx.x / 32;
        int first = group * GROUP + threadIdx.x % 32 * 4;
        Four four = raw_logits(row, first);
        float largest = MINUS_INFINITY;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float value = four.values[j], x = __fsub_rn(value, max);
            Mass weight = weight_of(x);
            total += weight;
            rank += first + j < row.vocab_size && comes_before(value, first + j, logit, id);
            largest = fmaxf(largest, value);
            if (has_alternatives && x >= LEAST_X)
                add_to_histogram(shared, bin_of(weight), 1);
        }
        largest = warp_largest(largest);
        if (threadIdx.x % 32 == 0 && group < num_groups)
            maxima[group] = largest;
    }
    total = block_mass(shared, total);
    rank = block_mass(shared, rank);
    if (threadIdx.x == 0) {
        atomicAdd(&state->total, total);
        atomicAdd(&state->rank, (unsigned)rank);
    }
    if (has_alternatives)
        flush_bins(shared, bins);
}

/* Writes the k ids with the largest logits.  Clears the row's bins. */
__device__ __forceinline__ void write_alternatives(
    Shared &shared, const LogitRow &row, float max, Mass *bins, const float *maxima, Mass *sums,
    int *ids, float *logits)
{
    int k = row.row->parameters.num_logprobs;
    unsigned bin = bin_that_reaches(shared, take_bin(bins), k);
    float bound = bin == NUM_BINS ? MINUS_INFINITY : least_x_of_bin(bin);
    LargestFirst rule;
    Candidates<LargestFirst> candidates = {
        rule, shared, row.logits, maxima, sums, max, bound, row.vocab_size, false};
    candidates.list();
    Threshold best = threshold_of(candidates, k);
    if (threadIdx.x == 0)
        shared.found = 0;
    __syncthreads();
    for (int start = 0; start < candidates.size; start += CHUNK)
        candidates.visit_chunk(start, [&](int id, float logit) {
            if (!best.keeps(rule.key(logit), id))
                return;
            unsigned place = atomicAdd(&shared.found, 1u);
            ids[place] = id;
            logits[place] = logit;
        });
}

extern "C" __global__ void __launch_bounds__(THREADS, 4) sample_logprobs(
    const float *logits, long long stride, int vocab_size, const Row *rows, State *states,
    Result *results, Mass *bins, float *maxima, Mass *sums, int num_alternatives,
    int *alternatives, float *alternative_logits)
{
    __shared__ Shared shared;
    const Row *row = rows + blockIdx.y;
    State *state = states + blockIdx.y;
    Result *result = results + blockIdx.y;
    int id = result->id;
    if (row->parameters.num_logprobs < 0 || id == FAILED)
        return;
    long long groups = (vocab_size + GROUP - 1) / GROUP, first_group = blockIdx.y * groups;
    Mass *own_bins = bins + (long long)blockIdx.y * NUM_BINS;
    LogitRow logit_row = {logits + blockIdx.y * stride, vocab_size, row, Tables{}};
    measure_chunk(shared, logit_row, state, own_bins, maxima + first_group, id);
    if (!is_last_block(shared, state))
        return;
    if (threadIdx.x == 0) {
        result->sum = state->total;
        result->logit = logit_row.logits[id];
        result->rank = 1 + (int)state->rank;
        state->total = 0;
        state->rank = 0;
    }
    if (row->parameters.num_logprobs > 0) {
        long long first = (long long)blockIdx.y * num_alternatives;
        write_alternatives(
            shared, logit_row, state->raw_max, own_bins, maxima + first_group, sums + first_group,
            alternatives + first, alternative_logits + first);
    }
}
