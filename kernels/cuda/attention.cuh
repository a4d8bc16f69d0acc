/* What the two attention kernels share: heads, the paged cache, scores.
 *
 * Macros: HEAD_DIM, PADDED_DIM (the next multiple of 16), NUM_HEADS, NUM_KV_HEADS.
 *
 * A block computes up to 8 heads that share a kv head, so that it reads keys and values once for all
 * of them.  The heads of a kv head with more are cut into equal groups. */
#include "output.cuh"
#include "ptx.cuh"

#define BLOCK_SIZE 16
#define HEADS_PER_KV_HEAD (NUM_HEADS / NUM_KV_HEADS)
#define NUM_GROUPS ((HEADS_PER_KV_HEAD + 7) / 8)
#define GROUP_HEADS ((HEADS_PER_KV_HEAD + NUM_GROUPS - 1) / NUM_GROUPS)
#define HEAD_BLOCKS (NUM_KV_HEADS * NUM_GROUPS) /* groups of heads, over all kv heads */

#define LOG2_E 1.44269504f
#define MASKED (-1e30f) /* finite: the difference of two is no NaN */

/* The heads that a block computes. */
struct HeadGroup
{
    int kv_head, first_head, num_heads;
};

__device__ __forceinline__ HeadGroup head_group(int head_block)
{
    HeadGroup group;
    group.kv_head = head_block / NUM_GROUPS;
    const int first = head_block % NUM_GROUPS * GROUP_HEADS;
    group.first_head = group.kv_head * HEADS_PER_KV_HEAD + first;
    group.num_heads = min(GROUP_HEADS, HEADS_PER_KV_HEAD - first);
    return group;
}

/* Offset of the first position of a block, in keys or values
 * [num_blocks, num_layers, NUM_KV_HEADS, BLOCK_SIZE, PADDED_DIM]. */
__device__ __forceinline__ long long block_offset(int block, int layer, int num_layers, int kv_head)
{
    return (((long long)block * num_layers + layer) * NUM_KV_HEADS + kv_head) * BLOCK_SIZE
           * PADDED_DIM;
}

/* The exponent, to base 2, of a position's weight: its product with q, scaled and capped. */
__device__ __forceinline__ float score(float product, float scale, float softcap)
{
    if (softcap == 0.0f)
        return product * (scale * LOG2_E);
    /* tanh(x) = 1 - 2 / (exp(2x) + 1), to about 1e-7; tanhf is several times slower. */
    const float exponential = exp2f(product * (scale / softcap * (2.0f * LOG2_E)));
    return softcap * LOG2_E * (1.0f - __fdividef(2.0f, exponential + 1.0f));
}

/* The first position that a row at `position` attends to; window 0: all. */
__device__ __forceinline__ int first_attended(int position, int window)
{
    return window ? max(0, position + 1 - window) : 0;
}
