/* Sampling, second: draws the ids of the rows that sample_max left open.
 *
 *     x = (adjusted logit - max) / temperature;  weight = floor(exp(x) * 2^40);  then top_k, top_p,
 *     min_p, typical_p and the draw, steps 3 to 9 of the contract
 *
 *     grid     (chunks of the vocabulary, rows), THREADS threads
 *     bins     [rows][NUM_BINS] uint64
 *     x        [rows][stride] float32, maxima [rows][groups] float32, sums [rows][groups] uint64:
 *              scratch
 *     others as in sample_max
 *
 * Without filters, the chunks leave the sum of each group of ids, and the last block finds the
 * group and the id.  With filters, the chunks leave bins of weights, which bound what top_k or
 * top_p can keep.  The last block lists the ids above that bound in shared memory, usually a few
 * dozen, and finds each filter's exact threshold among them.  If they are too many to list, the
 * same code reads x of the whole row in each of its passes. */
#include "philox.cuh"
#include "sample_block.cuh"

#define ALL (1ll << FRACTION_BITS)
#define SURPRISE_SCALE 1048576.0f /* 2^20 */

enum Stage { TOP_K, TOP_P, TYPICAL_P, NUM_FILTERS, DRAW = NUM_FILTERS };

/* Keys ascend as x or a weight falls, and are shifted so that many differ in their first digit. */
__device__ __forceinline__ unsigned key_of_x(float x) { return __float_as_uint(x) << 1; }

/* Weights have at most 24 significant bits, so floats hold them exactly. */
__device__ __forceinline__ unsigned key_of_weight(Mass weight)
{
    return (0x53800000u - __float_as_uint((float)weight)) << 3;
}

__device__ __forceinline__ int surprise_of(float x) { return (int)__fmul_rn(-x, SURPRISE_SCALE); }

__device__ __forceinline__ unsigned key_of_surprise(float x, int mean)
{
    return (unsigned)abs(surprise_of(x) - mean) << 7;
}

/* What the filters of a row have kept so far.  Those that have not been reached yet keep all. */
struct Filters {
    const Row *row;
    int vocab_size, stage;
    Threshold top_k, top_p, typical_p;
    Mass min_p;
    int mean_surprise;

    __device__ __forceinline__ unsigned key(float x) const
    {
        return stage == TOP_K   ? key_of_x(x)
               : stage == TOP_P ? key_of_weight(weight_of(x))
                                : key_of_surprise(x, mean_surprise);
    }

    __device__ __forceinline__ Mass amount(int id, float x) const
    {
        return stage == TOP_K ? 1 : kept_weight(id, x);
    }

    /* The weight of an id, 0 if a filter has dropped it. */
    __device__ __forceinline__ Mass kept_weight(int id, float x) const
    {
        if (!top_k.keeps(key_of_x(x), id))
            return 0;
        Mass weight = weight_of(x);
        if (weight == 0 || weight < min_p || !top_p.keeps(key_of_weight(weight), id))
            return 0;
        return typical_p.keeps(key_of_surprise(x, mean_surprise), id) ? weight : 0;
    }

    __device__ __forceinline__ bool has(int filter) const
    {
        const Parameters &p = row->parameters;
        return filter == TOP_K   ? p.top_k > 0 && p.top_k < vocab_size
               : filter == TOP_P ? p.top_p < ALL
                                 : p.typical_p < ALL;
    }

    __device__ __forceinline__ bool uses_bins() const { return has(TOP_K) || has(TOP_P); }

    __device__ __forceinline__ bool is_filtered() const
    {
        return uses_bins() || has(TYPICAL_P) || row->parameters.min_p > 0;
    }
};

/* The least integer that is at least fraction / 2^32 of the total; at least 1. */
__device__ __forceinline__ Mass share_of(Mass total, long long fraction)
{
    Mass low = (total & 0xffffffffu) * (Mass)fraction + 0xffffffffu;
    return max((total >> 32) * (Mass)fraction + (low >> 32), 1ull);
}

/* What the kernel computes of a row. */
struct Draw {
    LogitRow logits;
    float max;
    float *x, *maxima;
    Mass *sums, *bins;
};

/* x of the block's chunk, the sums and maxima of its groups, and the bins. */
__device__ __forceinline__ void measure_chunk(
    Shared &shared, const Draw &draw, const Filters &filters)
{
    bool uses_bins = filters.uses_bins(), counts_ids = filters.has(TOP_K);
    float temperature = draw.logits.row->parameters.temperature;
    int num_groups = (draw.logits.vocab_size + GROUP - 1) / GROUP;
    clear_histogram(shared);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < CHUNK / GROUP; i += WARPS) {
        int group = blockIdx.x * (CHUNK / GROUP) + i + threadIdx.x / 32;
        int id = group * GROUP + threadIdx.x % 32 * 4;
        Four four = adjusted_logits(draw.logits, id);
        Mass sum = 0;
        float largest = MINUS_INFINITY;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float x = __fsub_rn(four.values[j], draw.max);
            if (temperature != 1.0f)
                x = __fdiv_rn(x, temperature);
            four.values[j] = x;
            Mass weight = weight_of(x);
            sum += weight;
            largest = fmaxf(largest, x);
            if (uses_bins && x >= LEAST_X)
                add_to_histogram(shared, bin_of(weight), counts_ids ? 1 : weight);
        }
        if (id < draw.logits.vocab_size)
            *(float4 *)(draw.x + id) = make_float4(
                four.values[0], four.values[1], four.values[2], four.values[3]);
        sum = warp_mass(sum);
        largest = warp_largest(largest);
        if (threadIdx.x % 32 == 0 && group < num_groups) {
            draw.sums[group] = sum;
            draw.maxima[group] = largest;
        }
    }
    __syncthreads();
    if (uses_bins)
        flush_bins(shared, draw.bins);
}

/* A lower bound of x for all ids that the filters can keep.  Clears the row's bins; *total becomes
 * the sum of all weights if top_p is the first filter. */
__device__ __forceinline__ float bound_of(
    Shared &shared, const Filters &filters, Mass *bins, Mass *total)
{
    const Parameters &p = filters.row->parameters;
    if (!filters.uses_bins())
        return p.min_p > 0 ? least_x((float)p.min_p) : LEAST_X;
    Mass amount = take_bin(bins);
    *total = block_mass(shared, amount);
    Mass goal = filters.has(TOP_K) ? p.top_k : share_of(*total, p.top_p);
    unsigned bin = bin_that_reaches(shared, amount, goal);
    return bin == NUM_BINS ? LEAST_X : least_x_of_bin(bin);
}

/* The sum of the kept weights, and of these times their surprise / 2^24, in every thread. */
__device__ __forceinline__ Mass sum_kept(const Candidates<Filters> &candidates, Mass *surprises)
{
    Mass sum = 0, surprise = 0;
    for (int start = 0; start < candidates.size; start += CHUNK)
        candidates.visit_chunk(start, [&](int id, float x) {
            Mass weight = candidates.rule.kept_weight(id, x);
            sum += weight;
            surprise += weight * (Mass)surprise_of(x) >> 24;
        });
    *surprises = block_mass(candidates.shared, surprise);
    return block_mass(candidates.shared, sum);
}

/* Steps 4 to 8.  total: see bound_of */
__device__ __forceinline__ void run_filters(
    Filters &filters, const Candidates<Filters> &candidates, Mass total)
{
    const Parameters &p = filters.row->parameters;
#pragma unroll 1
    for (filters.stage = TOP_K; filters.stage < NUM_FILTERS; filters.stage++) {
        if (filters.stage == TYPICAL_P)
            filters.min_p = (Mass)p.min_p;
        if (!filters.has(filters.stage))
            continue;
        Mass goal = p.top_k;
        if (filters.stage != TOP_K) {
            Mass surprises, kept = sum_kept(candidates, &surprises);
            bool has_all = filters.stage == TOP_P && !filters.has(TOP_K);
            goal = share_of(has_all ? total : kept, filters.stage == TOP_P ? p.top_p : p.typical_p);
            filters.mean_surprise = (int)(surprises / (kept >> 24));
        }
        Threshold threshold = threshold_of(candidates, goal);
        if (filters.stage == TOP_K)
            filters.top_k = threshold;
        else if (filters.stage == TOP_P)
            filters.top_p = threshold;
        else
            filters.typical_p = threshold;
    }
}

/* Steps 4 to 9. */
__device__ __forceinline__ int draw_id(Shared &shared, Filters &filters, const Draw &draw)
{
    Candidates<Filters> candidates = {
        filters, shared, draw.x, draw.maxima, draw.sums, 0.0f, LEAST_X, filters.vocab_size, false};
    auto weight = [&](int id, float x) { return filters.kept_weight(id, x); };
    Mass total = 0;
    if (filters.is_filtered()) {
        candidates.bound = bound_of(shared, filters, draw.bins, &total);
        candidates.list();
        run_filters(filters, candidates, total);
        total = candidates.fill_sums(weight);
    } else {
        total = candidates.scan_sums();
    }
    const Parameters &p = filters.row->parameters;
    Mass bits = uniform_bits(p.seed, p.choice, filters.row->output_position);
    return candidates.id_that_exceeds(weight, __umul64hi(bits, total));
}

extern "C" __global__ void __launch_bounds__(THREADS, 4) sample_draw(
    const float *logits, long long stride, int vocab_size, const Row *rows, const unsigned *lines,
    long long line_words, const unsigned *masks, long long mask_words, const unsigned *words,
    State *states, int *ids, Result *results, Mass *bins, float *x, float *maxima, Mass *sums)
{
    __shared__ Shared shared;
    const Row *row = rows + blockIdx.y;
    State *state = states + blockIdx.y;
    if (!state->is_drawn)
        return;
    long long first_group = (long long)blockIdx.y * ((vocab_size + GROUP - 1) / GROUP);
    Tables tables = {lines, line_words, masks, mask_words, words};
    Draw draw = {{logits + blockIdx.y * stride, vocab_size, row, tables}, state->max,
                 x + blockIdx.y * stride, maxima + first_group, sums + first_group,
                 bins + (long long)blockIdx.y * NUM_BINS};
    Filters filters = {row, vocab_size, DRAW, KEEP_ALL, KEEP_ALL, KEEP_ALL, 0, 0};
    measure_chunk(shared, draw, filters);
    if (!is_last_block(shared, state))
        return;
    int id = draw_id(shared, filters, draw);
    if (threadIdx.x == 0)
        ids[blockIdx.y] = results[blockIdx.y].id = id;
}
