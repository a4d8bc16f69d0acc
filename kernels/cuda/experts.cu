/* out += scale * sum over the chosen experts e, best first, of weight_e * expert_e(x)
 *
 * A choice is one expert of one row: choice row * num_chosen + j is the row's j-th best.
 *   route           chooses experts from the router's logits
 *   group_choices   sorts choices by expert and cuts them into groups that a block can multiply
 *   (linear, linear_mma with GROUPED: gate, up and activation of each choice; then down)
 *   sum_choices     weights and adds the choices of each row
 * Each choice is a row of its own to the products, and the order in which they are sorted changes no
 * bit of its sums. */
#include "common.cuh"
#include "grouped.cuh"

/* The experts with the largest logits, best first, on a tie the lower index first; their weights are
 * softmax over the chosen if `normalise`, else over all.
 *
 *   logits        [num_rows, stride] float32, num_experts of them used
 *   topk_ids      [num_rows, num_chosen];  topk_weights  the same, float32
 * A warp a row. */
extern "C" __global__ void __launch_bounds__(32) route(int *topk_ids, float *topk_weights,
    const float *logits, long long stride, int num_experts, int num_chosen, int normalise)
{
    int lane = threadIdx.x;
    logits += blockIdx.x * stride;
    topk_ids += (long long)blockIdx.x * num_chosen;
    topk_weights += (long long)blockIdx.x * num_chosen;
    float last = 0.0f, largest = 0.0f, sum = 0.0f;
    int last_id = -1;
    for (int j = 0; j < num_chosen; j++) {
        float best = 0.0f;
        int best_id = num_experts;
        for (int e = lane; e < num_experts; e += 32) {
            float logit = logits[e];
            bool is_left = last_id < 0 || logit < last || (logit == last && e > last_id);
            if (is_left && (best_id == num_experts || logit > best)) {
                best = logit;
                best_id = e;
            }
        }
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) {
            float other = __shfl_xor_sync(ALL_LANES, best, offset);
            int other_id = __shfl_xor_sync(ALL_LANES, best_id, offset);
            bool is_better = other > best || (other == best && other_id < best_id);
            if (other_id < num_experts && (best_id == num_experts || is_better)) {
                best = other;
                best_id = other_id;
            }
        }
        if (best_id == num_experts) /* logits are NaN; the row is lost, but must stay in bounds */
            best_id = j;
        last = best;
        last_id = best_id;
        largest = j == 0 ? best : largest;
        float weight = expf(best - largest);
        sum += weight;
        if (lane == 0) {
            topk_ids[j] = best_id;
            topk_weights[j] = weight;
        }
    }
    if (!normalise) {
        sum = 0.0f;
        for (int e = lane; e < num_experts; e += 32)
            sum += expf(logits[e] - largest);
        sum = warp_sum(sum);
    }
    __syncwarp();
    for (int j = lane; j < num_chosen; j += 32)
        topk_weights[j] /= sum;
}

/*   sorted_choices  [num_choices], ascending by expert, then by number
 *   groups          of at most group_rows choices of one expert;  num_groups  how many there are
 * A block an expert.  Dynamic shared memory: num_experts int. */
extern "C" __global__ void __launch_bounds__(256)
    group_choices(int *sorted_choices, Group *groups, int *num_groups, const int *topk_ids,
        int num_choices, int num_experts, int group_rows)
{
    extern __shared__ int counts[];
    __shared__ int scratch[32];
    int expert = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int e = threadIdx.x; e < num_experts; e += blockDim.x)
        counts[e] = 0;
    __syncthreads();
    for (int c = threadIdx.x; c < num_choices; c += blockDim.x)
        atomicAdd(&counts[topk_ids[c]], 1);
    __syncthreads();

    int before = 0, groups_before = 0;
    for (int e = threadIdx.x; e < expert; e += blockDim.x) {
        before += counts[e];
        groups_before += (counts[e] + group_rows - 1) / group_rows;
    }
    before = block_sum(before, scratch);
    groups_before = block_sum(groups_before, scratch);
    int count = counts[expert], own_groups = (count + group_rows - 1) / group_rows;
    for (int i = threadIdx.x; i < own_groups; i += blockDim.x) {
        int rows = min(group_rows, count - i * group_rows);
        groups[groups_before + i] = {expert, before + i * group_rows, rows, 0};
    }
    if (expert == num_experts - 1 && threadIdx.x == 0)
        *num_groups = groups_before + own_groups;

    for (int start = 0; start < num_choices; start += blockDim.x) {
        int c = start + threadIdx.x;
        bool is_own = c < num_choices && topk_ids[c] == expert;
        unsigned own = __ballot_sync(ALL_LANES, is_own);
        if (lane == 0)
            scratch[warp] = __popc(own);
        __syncthreads();
        int position = before + __popc(own & ((1u << lane) - 1));
        for (int w = 0; w < blockDim.x / 32; w++) {
            position += w < warp ? scratch[w] : 0;
            before += scratch[w];
        }
        if (is_own)
            sorted_choices[position] = c;
        __syncthreads();
    }
}

/*   out           [num_rows, out_stride] float32
 *   choices       [num_rows * num_chosen, choices_stride] float32: what each expert returned
 * Grid: blocks of 256 columns, by rows. */
extern "C" __global__ void __launch_bounds__(256)
    sum_choices(float *out, long long out_stride, const float *choices, long long choices_stride,
        const float *topk_weights, int width, int num_chosen, float scale)
{
    int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= width)
        return;
    long long first = (long long)blockIdx.y * num_chosen;
    float sum = 0.0f;
    for (int j = 0; j < num_chosen; j++)
        sum += topk_weights[first + j] * choices[(first + j) * choices_stride + column];
    out[blockIdx.y * out_stride + column] += scale * sum;
}
