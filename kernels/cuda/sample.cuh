/* The sampling contract of backend/sampling/reference_sampler.py, bit for bit: what its kernels
 * share.  The structures mirror backend/cuda/sampling_layout.py.
 *
 * Floats are rounded operation by operation: each is an intrinsic ending in _rn, which the compiler
 * never fuses.  Everything after exp is an integer, so no sum depends on its order.
 *
 * A block of 256 threads covers a chunk of 2048 ids, a warp 128 of them at a time (a group), a lane
 * four neighbours, which it loads as 16 bytes.  All blocks of a row add what they found to that
 * row's state; the last one to finish completes the row.  Greedy rows take one kernel, sampled ones
 * two, and each reads the logits once.
 *
 * Why not one block a row: 128k logits are 512 KB.  One multiprocessor takes about 5 us to read
 * them from the L2 cache, and 20 us more for their exp; 63 blocks take about 1 us for both
 * (computed, not measured).  So what needs every logit is done by all blocks, and the last block
 * looks only at the few ids that are left. */

typedef unsigned long long Mass; /* weights and sums of them */

enum {
    THREADS = 256,
    WARPS = THREADS / 32,
    GROUP = 128,
    CHUNK = 2048,
    NUM_BINS = THREADS,
    FAILED = -1,
    WEIGHT_BITS = 40,
    FRACTION_BITS = 32
};

#define LEAST_X (-28.0f) /* weights of smaller x are 0 */
#define ALL_LANES 0xffffffffu
#define MINUS_INFINITY __int_as_float((int)0xff800000)

/* PARAMETERS of backend/sampling/table.py */
struct Parameters {
    unsigned long long seed;
    long long top_p, typical_p, min_p;
    unsigned choice;
    int top_k;
    float temperature, repetition_penalty, presence_penalty, frequency_penalty;
    int num_logprobs, has_extras;
};

/* ROW: a logit row of the step. */
struct Row {
    Parameters parameters;
    long long output_position;
    int target, draft, num_drafted;  /* num_drafted: its draft and those of the rows before it */
    int bias, counts;                /* lines of Tables.lines, -1 if absent */
    int in_prompt, allowed, end_ids; /* lines of Tables.masks, -1 if absent */
    int grammar;                     /* where its mask begins in Tables.words, -1 if absent */
    int slot;
};

/* What Row points into. */
struct Tables {
    const unsigned *lines; /* [lines][line_words]: a word for each id */
    long long line_words;
    const unsigned *masks; /* [masks][mask_words]: a bit for each id */
    long long mask_words;
    const unsigned *words; /* uploaded for this step */
};

/* STATE: what the kernels of a step know of a row.  All but the last three fields are 0 between
 * kernels. */
struct State {
    unsigned long long best; /* key of the largest adjusted logit, and its id inverted */
    Mass total;
    unsigned raw_best; /* key of the largest logit */
    unsigned rank;
    unsigned num_blocks; /* that have finished */
    int is_drawn;        /* sample_draw must draw the row's id */
    float raw_max, max;  /* the largest logit as it is, and adjusted */
};

/* RESULT: what the host reads. */
struct Result {
    Mass sum; /* of the weights of the row's own logits at temperature 1 */
    float max, logit;
    int id, rank;
};

/* A key that ascends with the value; 0 and -0 have equal keys. */
__device__ __forceinline__ unsigned ascending_key(float value)
{
    unsigned bits = __float_as_uint(__fadd_rn(value, 0.0f));
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float value_of_key(unsigned key)
{
    return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

/* floor(exp(x) * 2^40); 0 for x below LEAST_X. */
__device__ __forceinline__ Mass weight_of(float x)
{
    if (!(x >= LEAST_X))
        return 0;
    int n = __float2int_rn(__fmul_rn(x, 0x1.715476p+0f));
    float whole = (float)n;
    float r = __fsub_rn(x, __fmul_rn(whole, 0x1.62e4p-1f));
    r = __fsub_rn(r, __fmul_rn(whole, 0x1.7f7d1cp-20f));
    float y = 0x1.6a23d0p-10f;
    y = __fadd_rn(__fmul_rn(y, r), 0x1.123a20p-7f);
    y = __fadd_rn(__fmul_rn(y, r), 0x1.5558f2p-5f);
    y = __fadd_rn(__fmul_rn(y, r), 0x1.555492p-3f);
    y = __fadd_rn(__fmul_rn(y, r), 0x1.fffffcp-2f);
    y = __fadd_rn(__fmul_rn(y, r), 1.0f);
    y = __fadd_rn(__fmul_rn(y, r), 1.0f);
    /* A product with a power of two is exact. */
    return (Mass)__fmul_rn(y, __int_as_float((n + 127 + WEIGHT_BITS) << 23));
}

/* The logits of one row. */
struct LogitRow {
    const float *logits;
    int vocab_size;
    const Row *row; /* the rows before it are those of its drafts */
    Tables tables;
};

struct Four {
    float values[4];
};

/* Elements id .. id + 3 of a row, -infinity where they are beyond its size.  `id` is a multiple of
 * 4, and rows are padded to a multiple of 4. */
__device__ __forceinline__ Four four_values(const float *row, int id, int size)
{
    Four four = {{MINUS_INFINITY, MINUS_INFINITY, MINUS_INFINITY, MINUS_INFINITY}};
    if (id < size) {
        float4 loaded = *(const float4 *)(row + id);
        float values[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (id + i < size)
                four.values[i] = values[i];
    }
    return four;
}

__device__ __forceinline__ Four raw_logits(const LogitRow &r, int id)
{
    return four_values(r.logits, id, r.vocab_size);
}

__device__ __forceinline__ float penalized(float value, const Parameters &parameters, int count)
{
    float repetition = parameters.repetition_penalty;
    value = value > 0.0f ? __fdiv_rn(value, repetition) : __fmul_rn(value, repetition);
    if (count == 0)
        return value;
    value = __fsub_rn(value, parameters.presence_penalty);
    return __fsub_rn(value, __fmul_rn(parameters.frequency_penalty, (float)count));
}

/* Step 2 for four ids.  The drafts before the row count as part of the output. */
__device__ __forceinline__ void penalize(const LogitRow &r, int id, Four &four)
{
    const Row &row = *r.row;
    int4 loaded = *(const int4 *)(r.tables.lines + row.counts * r.tables.line_words + id);
    int counts[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
    unsigned in_prompt = r.tables.masks[row.in_prompt * r.tables.mask_words + id / 32] >> id % 32;
    for (int i = 0; i < row.num_drafted; i++) {
        int drafted = (&row)[-i].draft - id;
#pragma unroll
        for (int j = 0; j < 4; j++)
            counts[j] += drafted == j;
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (counts[i] > 0 || (in_prompt >> i & 1))
            four.values[i] = penalized(four.values[i], row.parameters, counts[i]);
}

/* Steps 1 and 2: raw_logits with bias, masks and penalties. */
__device__ __forceinline__ Four adjusted_logits(const LogitRow &r, int id)
{
    Four four = raw_logits(r, id);
    const Row &row = *r.row;
    const Tables &tables = r.tables;
    if (!row.parameters.has_extras || id >= r.vocab_size)
        return four;
    if (row.bias >= 0) {
        const float *line = (const float *)(tables.lines + row.bias * tables.line_words);
        float4 bias = *(const float4 *)(line + id);
        four.values[0] = __fadd_rn(four.values[0], bias.x);
        four.values[1] = __fadd_rn(four.values[1], bias.y);
        four.values[2] = __fadd_rn(four.values[2], bias.z);
        four.values[3] = __fadd_rn(four.values[3], bias.w);
    }
    unsigned allowed = 0xffffffffu;
    if (row.end_ids >= 0)
        allowed &= tables.masks[row.end_ids * tables.mask_words + id / 32];
    if (row.allowed >= 0)
        allowed &= tables.masks[row.allowed * tables.mask_words + id / 32];
    if (row.grammar >= 0)
        allowed &= tables.words[row.grammar + id / 32];
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (!(allowed >> (id % 32 + i) & 1))
            four.values[i] = MINUS_INFINITY;
    if (row.counts >= 0)
        penalize(r, id, four);
    return four;
}
