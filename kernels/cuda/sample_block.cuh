/* Sampling: what the threads of a block do together. */
#include "sample.cuh"

enum { MAX_LISTED = 2048 };

/* Amounts by bin, in two halves, so that shared memory can add them as 32-bit integers.  Neither
 * half overflows for CHUNK weights: each is at most 2^40, and CHUNK is 2^11. */
enum { LOW_BITS = 21 };

struct Histogram {
    unsigned low[NUM_BINS], high[NUM_BINS];
};

/* Shared memory through which the threads of a block exchange values. */
struct BlockShared {
    Mass warp_masses[WARPS];
    Mass left;
    unsigned found;
    int is_last;
};

struct __align__(16) Shared : BlockShared {
    float values[MAX_LISTED]; /* of the candidates, if they fit */
    int ids[MAX_LISTED];      /* of the candidates; they ascend */
    Histogram histogram;
};

__device__ __forceinline__ Mass warp_mass(Mass mass)
{
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
        mass += __shfl_xor_sync(ALL_LANES, mass, offset);
    return mass;
}

__device__ __forceinline__ float warp_largest(float value)
{
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
        value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, offset));
    return value;
}

/* The sum of the masses of lower lanes. */
__device__ __forceinline__ Mass warp_mass_before(Mass mass)
{
    int lane = threadIdx.x % 32;
    Mass sum = mass;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        Mass other = __shfl_up_sync(ALL_LANES, sum, offset);
        sum += lane >= offset ? other : 0;
    }
    return sum - mass;
}

/* The sum of the masses of lower threads; *total becomes that of all threads. */
__device__ __forceinline__ Mass block_mass_before(BlockShared &shared, Mass mass, Mass *total)
{
    int warp = threadIdx.x / 32;
    Mass before = warp_mass_before(mass);
    if (threadIdx.x % 32 == 31)
        shared.warp_masses[warp] = before + mass;
    __syncthreads();
    Mass sum = 0;
    for (int i = 0; i < WARPS; i++) {
        before += i < warp ? shared.warp_masses[i] : 0;
        sum += shared.warp_masses[i];
    }
    __syncthreads();
    *total = sum;
    return before;
}

__device__ __forceinline__ Mass block_mass(BlockShared &shared, Mass mass)
{
    Mass total;
    block_mass_before(shared, mass, &total);
    return total;
}

/* True in the last block of the row to call this.  It sees all that the others wrote before. */
__device__ __forceinline__ bool is_last_block(BlockShared &shared, State *state)
{
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        shared.is_last = atomicAdd(&state->num_blocks, 1u) == gridDim.x - 1;
        __threadfence();
        if (shared.is_last)
            state->num_blocks = 0;
    }
    __syncthreads();
    return shared.is_last;
}

__device__ __forceinline__ void clear_histogram(Shared &shared)
{
    shared.histogram.low[threadIdx.x] = shared.histogram.high[threadIdx.x] = 0;
}

__device__ __forceinline__ void add_to_histogram(Shared &shared, int bin, Mass amount)
{
    unsigned high = (unsigned)(amount >> LOW_BITS);
    atomicAdd(&shared.histogram.low[bin], (unsigned)amount & ((1u << LOW_BITS) - 1));
    if (high)
        atomicAdd(&shared.histogram.high[bin], high);
}

/* The sum of the thread's own bin. */
__device__ __forceinline__ Mass own_bin(const Shared &shared)
{
    Mass high = shared.histogram.high[threadIdx.x];
    return shared.histogram.low[threadIdx.x] + (high << LOW_BITS);
}

/* ---- Bins: rule out most ids before they are looked at one by one
 *
 * A row has NUM_BINS of them, for the sizes of weights, four for each power of two.  They hold
 * weights or numbers of ids, and are all 0 between kernels. */

/* The bin of a weight: its power of two and the next two bits.  Weight 0 shares bin 0. */
__device__ __forceinline__ int bin_of(Mass weight)
{
    return weight ? (__float_as_uint((float)weight) - 0x3f800000u) >> 21 : 0;
}

/* A lower bound of x, for weights of at least `least`.  The slack is far larger than the error of
 * weight_of and of logf, so that nothing is missed; a few ids more do no harm. */
__device__ __forceinline__ float least_x(float least)
{
    return fmaxf(logf(least) - WEIGHT_BITS * 0.693147181f - 0.01f, LEAST_X);
}

__device__ __forceinline__ float least_x_of_bin(unsigned bin)
{
    return bin == 0 ? LEAST_X : least_x(__uint_as_float(0x3f800000u + (bin << 21)));
}

/* Adds the block's histogram to the row's bins. */
__device__ __forceinline__ void flush_bins(const Shared &shared, Mass *bins)
{
    Mass amount = own_bin(shared);
    if (amount)
        atomicAdd(&bins[threadIdx.x], amount);
}

/* Returns the amount of bin NUM_BINS - 1 - threadIdx.x, and clears the bin for the next kernel. */
__device__ __forceinline__ Mass take_bin(Mass *bins)
{
    Mass *own = &bins[NUM_BINS - 1 - threadIdx.x], amount = *own;
    *own = 0;
    return amount;
}

/* The highest bin such that it and those above it reach the goal; NUM_BINS if all do not.
 *
 * amount  what take_bin returned */
__device__ __forceinline__ unsigned bin_that_reaches(Shared &shared, Mass amount, Mass goal)
{
    Mass total, before = block_mass_before(shared, amount, &total);
    if (total < goal)
        return NUM_BINS;
    if (before < goal && goal <= before + amount)
        shared.found = NUM_BINS - 1 - threadIdx.x;
    __syncthreads();
    unsigned bin = shared.found;
    __syncthreads();
    return bin;
}

/* ---- Candidates: the ids of a row that a bound leaves */

/* The ids of a row that are still in question.  A Rule has
 *     unsigned key(float value)         what a threshold compares
 *     Mass amount(int id, float value)  what a threshold or a draw sums; 0 if filtered out
 * Positions count the listed candidates, or are ids if there are too many to list. */
template <class Rule> struct Candidates {
    const Rule &rule;
    Shared &shared;
    const float *values; /* [vocab_size], by id; rows are padded to a multiple of 4 */
    const float *maxima; /* [groups], the largest value of each group of ids */
    Mass *sums;          /* [groups], scratch */
    float max, bound;    /* candidates have value - max >= bound */
    int size;            /* positions; vocab_size until there is a list */
    bool is_listed;

    __device__ __forceinline__ int num_groups() const { return (size + GROUP - 1) / GROUP; }

    __device__ __forceinline__ bool is_above(float value) const
    {
        return __fsub_rn(value, max) >= bound;
    }

    /* Calls f(id, value, i) for the candidates among the lane's four positions i of a group. */
    template <class F> __device__ __forceinline__ void visit_group(int group, F f) const
    {
        int first = group * GROUP + threadIdx.x % 32 * 4;
        if (!is_listed && !is_above(maxima[group]))
            return;
        Four four = four_values(is_listed ? shared.values : values, first, size);
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (first + i < size && (is_listed || is_above(four.values[i])))
                f(is_listed ? shared.ids[first + i] : first + i, four.values[i], i);
    }

    /* Calls f(id, value) for all candidates from position `start` on, at most CHUNK of them. */
    template <class F> __device__ __forceinline__ void visit_chunk(int start, F f) const
    {
        int end = min(num_groups(), (start + CHUNK) / GROUP);
        for (int group = start / GROUP + threadIdx.x / 32; group < end; group += WARPS)
            visit_group(group, [&](int id, float value, int) { f(id, value); });
    }

    /* `sums` becomes the amounts of the groups before each group; returns the total. */
    template <class Amount> __device__ __forceinline__ Mass fill_sums(Amount amount) const
    {
        for (int group = threadIdx.x / 32; group < num_groups(); group += WARPS) {
            Mass sum = 0;
            visit_group(group, [&](int id, float value, int) { sum += amount(id, value); });
            sum = warp_mass(sum);
            if (threadIdx.x % 32 == 0)
                sums[group] = sum;
        }
        __syncthreads();
        return scan_sums();
    }

    /* `sums`, the amount of each group, becomes that of the groups before; returns the total. */
    __device__ __forceinline__ Mass scan_sums() const
    {
        Mass sum = 0, total;
        for (int start = 0; start < num_groups(); start += THREADS) {
            int group = start + threadIdx.x;
            Mass own = group < num_groups() ? sums[group] : 0;
            Mass before = block_mass_before(shared, own, &total);
            if (group < num_groups())
                sums[group] = sum + before;
            sum += total;
        }
        __syncthreads();
        return sum;
    }

    /* The first id at which the running sum of the amounts exceeds the target, after fill_sums. */
    template <class Amount>
    __device__ __forceinline__ int id_that_exceeds(Amount amount, Mass target) const
    {
        int last = num_groups() - 1;
        for (int group = threadIdx.x; group <= last; group += THREADS)
            if (sums[group] <= target && (group == last || target < sums[group + 1])) {
                shared.found = group;
                shared.left = target - sums[group];
            }
        __syncthreads();
        int group = shared.found;
        Mass left = shared.left;
        __syncthreads();
        if (threadIdx.x < 32) {
            Mass amounts[4] = {0, 0, 0, 0};
            int ids[4];
            visit_group(group, [&](int id, float value, int i) {
                ids[i] = id;
                amounts[i] = amount(id, value);
            });
            Mass own = amounts[0] + amounts[1] + amounts[2] + amounts[3];
            Mass before = warp_mass_before(own);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (before <= left && left < before + amounts[i])
                    shared.found = ids[i];
                before += amounts[i];
            }
        }
        __syncthreads();
        int id = shared.found;
        __syncthreads();
        return id;
    }

    /* Lists the candidates in shared memory, if they are at most MAX_LISTED. */
    __device__ __forceinline__ void list()
    {
        int count = 0;
        for (int start = 0; start < num_groups(); start += THREADS) {
            count += list_groups(start, count);
            if (count > MAX_LISTED)
                return;
        }
        /* Lanes load four values, also at the end of the list. */
        if (count % 4 && threadIdx.x < 4 - count % 4)
            shared.values[count + threadIdx.x] = MINUS_INFINITY;
        __syncthreads();
        size = count;
        is_listed = true;
    }

    /* Adds the candidates of THREADS groups to a list of `count`, if there is room for all of them;
     * returns their number.  A warp takes 32 groups, those with a candidate one by one. */
    __device__ __forceinline__ int list_groups(int start, int count)
    {
        int group = start + threadIdx.x, first = group / 32 * 32, lane = threadIdx.x % 32;
        bool has_any = group < num_groups() && is_above(maxima[group]);
        unsigned groups = __ballot_sync(ALL_LANES, has_any);
        Mass own = 0, total;
        for (unsigned left = groups; left; left &= left - 1)
            visit_group(first + __ffs(left) - 1, [&](int, float, int) { own++; });
        own = warp_mass(own);
        Mass before = block_mass_before(shared, lane == 31 ? own : 0, &total);
        if (count + total > MAX_LISTED)
            return (int)total;
        int position = count + (int)before;
        for (unsigned left = groups; left; left &= left - 1) {
            float values[4];
            unsigned present = 0;
            group = first + __ffs(left) - 1;
            visit_group(group, [&](int, float value, int i) {
                values[i] = value;
                present |= 1u << i;
            });
            int end = position + (int)warp_mass_before(__popc(present)) + __popc(present);
            int place = end - __popc(present);
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (present >> i & 1) {
                    shared.ids[place] = group * GROUP + lane * 4 + i;
                    shared.values[place++] = values[i];
                }
            position = __shfl_sync(ALL_LANES, end, 31);
        }
        return (int)total;
    }
};

/* ---- Thresholds */

/* What a filter keeps: smaller keys, and of equal ones the ids up to last_id. */
struct Threshold {
    unsigned key;
    int last_id;

    __device__ __forceinline__ bool keeps(unsigned other, int id) const
    {
        return other < key || (other == key && id <= last_id);
    }
};

#define KEEP_ALL Threshold{0xffffffffu, 0x7fffffff}

/* Keeps the smallest keys until their amounts reach the goal, the lowest ids among equal keys.  The
 * key is found digit by digit, the highest first. */
template <class Rule> __device__ __forceinline__ Threshold threshold_of(
    const Candidates<Rule> &candidates, Mass goal)
{
    const Rule &rule = candidates.rule;
    Shared &shared = candidates.shared;
    unsigned known = 0, mask = 0;
#pragma unroll 1
    for (int shift = 24; shift >= 0; shift -= 8) {
        Mass own = 0, total;
#pragma unroll 1
        for (int start = 0; start < candidates.size; start += CHUNK) {
            clear_histogram(shared);
            __syncthreads();
            candidates.visit_chunk(start, [&](int id, float value) {
                unsigned key = rule.key(value);
                Mass amount = (key & mask) == known ? rule.amount(id, value) : 0;
                if (amount)
                    add_to_histogram(shared, key >> shift & 255, amount);
            });
            __syncthreads();
            own += own_bin(shared);
        }
        Mass before = block_mass_before(shared, own, &total);
        if (total < goal)
            return KEEP_ALL;
        if (before < goal && goal <= before + own) {
            shared.found = threadIdx.x;
            shared.left = goal - before;
        }
        __syncthreads();
        known |= shared.found << shift;
        mask |= 255u << shift;
        goal = shared.left;
    }
    auto amount_of_tie = [&](int id, float value) {
        return rule.key(value) == known ? rule.amount(id, value) : 0;
    };
    candidates.fill_sums(amount_of_tie);
    return {known, candidates.id_that_exceeds(amount_of_tie, goal - 1)};
}
