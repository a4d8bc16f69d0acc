/* What the two attention kernels share: heads, the paged cache, scores.
 *
 * Macros: HEAD_DIM, PADDED_DIM (the next multiple of 16), NUM_HEADS, NUM_KV_HEADS; HAS_SOFTCAP if
 * scores are capped.
 *
 * A block computes a group of up to 8 heads that share a kv head, and so reads keys and values once
 * for all of them.  A kv head with more heads has several groups of equal size. */
#include "output.cuh"
#include "ptx.cuh"

#define BLOCK_SIZE 16
#define HEADS_PER_KV_HEAD (NUM_HEADS / NUM_KV_HEADS)
#define GROUPS_PER_KV_HEAD ((HEADS_PER_KV_HEAD + 7) / 8)
#define GROUP_HEADS ((HEADS_PER_KV_HEAD + GROUPS_PER_KV_HEAD - 1) / GROUPS_PER_KV_HEAD)
#define NUM_GROUPS (NUM_KV_HEADS * GROUPS_PER_KV_HEAD)

#define LOG2_E 1.44269504f
#define MASKED (-1e30f) /* finite: the difference of two is no NaN */

struct HeadGroup
{
    int kv_head, first_head, num_heads;
};

__device__ __forceinline__ HeadGroup head_group(int index)
{
    HeadGroup group;
    group.kv_head = index / GROUPS_PER_KV_HEAD;
    const int first = index % GROUPS_PER_KV_HEAD * GROUP_HEADS;
    group.first_head = group.kv_head * HEADS_PER_KV_HEAD + first;
    group.num_heads = min(GROUP_HEADS, HEADS_PER_KV_HEAD - first);
    return group;
}

/* Offset of a block's first position in keys or values
 * [num_blocks, num_layers, NUM_KV_HEADS, BLOCK_SIZE, PADDED_DIM]. */
__device__ __forceinline__ long long block_offset(int block, int layer, int num_layers, int kv_head)
{
    return (((long long)block * num_layers + layer) * NUM_KV_HEADS + kv_head) * BLOCK_SIZE
           * PADDED_DIM;
}

/* A score is a product of q and k, capped or not.  exp2(score * score_scale()) is its weight. */
__device__ __forceinline__ float capped(float product, float scale, float softcap)
{
#ifdef HAS_SOFTCAP
    /* tanh(x) = 1 - 2 / (exp(2x) + 1), to about 1e-7; tanhf is several times slower. */
    const float exponential = exp2f(product * (scale / softcap * (2.0f * LOG2_E)));
    return softcap * (1.0f - __fdividef(2.0f, exponential + 1.0f));
#else
    return product;
#endif
}

__device__ __forceinline__ float score_scale(float scale)
{
#ifdef HAS_SOFTCAP
    return LOG2_E;
#else
    return scale * LOG2_E;
#endif
}

/* Two weights, which are at most 1, in a register. */
__device__ __forceinline__ unsigned pack_weights(float first, float second)
{
    union { T16x2 pair; unsigned bits; } packed;
#ifdef BFLOAT16
    packed.pair = __floats2bfloat162_rn(first, second);
#else
    packed.pair = __floats2half2_rn(first, second);
#endif
    return packed.bits;
}

/* The first position that a row at `position` attends to; window 0: all. */
__device__ __forceinline__ int first_attended(int position, int window)
{
    return window ? max(0, position + 1 - window) : 0;
}
