/* Sampling: what lives longer than a step.  write_lines fills the lines of slots that were set
 * since the last step; count_ids counts the ids that a step has drawn.
 *
 *     writes  [grid], see Write; words [..] uploaded for this step
 *     lines   [lines][line_words], a word for each id: a bias or a count
 *     masks   [masks][mask_words], a bit for each id */
#include "sample.cuh"

/* WRITE of backend/cuda/sampling_layout.py: one line. */
struct Write {
    int line;
    int is_mask; /* 1: mask_words words for a line of `masks`; 0: num_ids ids, and then a word
                  * for each, for a line of `lines`, whose other words become 0 */
    int start;   /* in `words` */
    int num_ids;
};

extern "C" __global__ void __launch_bounds__(THREADS) write_lines(
    const Write *writes, const unsigned *words, unsigned *lines, long long line_words,
    unsigned *masks, long long mask_words)
{
    Write write = writes[blockIdx.x];
    const unsigned *source = words + write.start;
    if (write.is_mask) {
        for (long long i = threadIdx.x; i < mask_words; i += THREADS)
            masks[write.line * mask_words + i] = source[i];
        return;
    }
    unsigned *line = lines + write.line * line_words;
    for (long long i = threadIdx.x; i < line_words; i += THREADS)
        line[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < write.num_ids; i += THREADS)
        line[source[i]] = source[write.num_ids + i];
}

/* Counts the ids of rows whose drafts before them were all drawn, in slots that have counts.  A
 * thread takes a row. */
extern "C" __global__ void __launch_bounds__(THREADS) count_ids(
    const Row *rows, int num_rows, const int *ids, unsigned *lines, long long line_words)
{
    int r = blockIdx.x * THREADS + threadIdx.x;
    if (r >= num_rows || rows[r].counts < 0 || rows[r].target >= 0 || ids[r] == FAILED)
        return;
    for (int i = r; rows[i].draft >= 0; i--)
        if (ids[i - 1] != rows[i].draft)
            return;
    atomicAdd(lines + rows[r].counts * line_words + ids[r], 1u);
}
