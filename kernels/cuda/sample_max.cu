/* Sampling, first: the largest logit of each row, and with it the ids of rows that need no draw.
 *
 *     id = FAILED if a logit is NaN or +inf, or if no id is left; else the target, if there is one;
 *     else at temperature 0 the id of the largest adjusted logit, the lowest of a tie
 *
 *     grid     (chunks of the vocabulary, rows), THREADS threads
 *     logits   [rows][stride] float32, the padding may hold anything; stride is a multiple of 4
 *     rows     [rows] of Row, uploaded for this step
 *     lines, line_words, masks, mask_words, words   see Tables
 *     states   [rows] of State
 *     ids      [rows], 0 where sample_draw draws the id
 *     results  [rows] of Result
 *
 * Maxima are found by atomicMax of integer keys, so the order of the blocks does not matter. */
#include "sample_block.cuh"

#define KEY_OF_NAN 0xffffffffu
#define KEY_OF_INFINITY 0xff800000u
#define KEY_OF_MINUS_INFINITY 0x007fffffu

__device__ __forceinline__ unsigned long long warp_max_key(unsigned long long key)
{
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
        key = max(key, __shfl_xor_sync(ALL_LANES, key, offset));
    return key;
}

/* The largest key of all threads, in thread 0. */
__device__ unsigned long long block_max_key(Mass *scratch, unsigned long long key)
{
    key = warp_max_key(key);
    __syncthreads();
    if (threadIdx.x % 32 == 0)
        scratch[threadIdx.x / 32] = key;
    __syncthreads();
    for (int i = 0; i < WARPS; i++)
        key = max(key, scratch[i]);
    return key;
}

__device__ bool is_finite_key(unsigned key)
{
    return key > KEY_OF_MINUS_INFINITY && key < KEY_OF_INFINITY;
}

/* The row's id, or 0 if it must be drawn. */
__device__ int decide(const Row &row, State *state)
{
    unsigned key = (unsigned)(state->best >> 32);
    state->raw_max = value_of_key(state->raw_best);
    state->max = value_of_key(key);
    state->is_drawn = 0;
    if (!is_finite_key(state->raw_best))
        return FAILED;
    if (row.target >= 0)
        return row.target;
    if (!is_finite_key(key))
        return FAILED;
    if (row.parameters.temperature == 0.0f)
        return (int)~(unsigned)state->best;
    state->is_drawn = 1;
    return 0;
}

extern "C" __global__ void __launch_bounds__(THREADS, 4) sample_max(
    const float *logits, long long stride, int vocab_size, const Row *rows, const unsigned *lines,
    long long line_words, const unsigned *masks, long long mask_words, const unsigned *words,
    State *states, int *ids, Result *results)
{
    __shared__ BlockShared shared;
    const Row *row = rows + blockIdx.y;
    State *state = states + blockIdx.y;
    Tables tables = {lines, line_words, masks, mask_words, words};
    LogitRow logit_row = {logits + blockIdx.y * stride, vocab_size, row, tables};

    unsigned raw_best = 0;
    unsigned long long best = 0;
#pragma unroll
    for (int i = 0; i < CHUNK; i += 4 * THREADS) {
        int id = blockIdx.x * CHUNK + i + threadIdx.x * 4;
        Four raw = raw_logits(logit_row, id), adjusted = adjusted_logits(logit_row, id);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float value = raw.values[j];
            raw_best = max(raw_best, value == value ? ascending_key(value) : KEY_OF_NAN);
            unsigned key = ascending_key(adjusted.values[j]);
            best = max(best, (unsigned long long)key << 32 | ~(unsigned)(id + j));
        }
    }
    best = block_max_key(shared.warp_masses, best);
    raw_best = (unsigned)block_max_key(shared.warp_masses, raw_best);
    if (threadIdx.x == 0) {
        atomicMax(&state->best, best);
        atomicMax(&state->raw_best, raw_best);
    }
    if (!is_last_block(shared, state) || threadIdx.x != 0)
        return;
    int id = decide(*row, state);
    ids[blockIdx.y] = id;
    results[blockIdx.y] = {0, state->raw_max, 0.0f, id, 0};
    state->best = 0;
    state->raw_best = 0;
}
