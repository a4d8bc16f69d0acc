/* Sorts ids by their logits: the largest first, among equals the lowest id first. */
#ifndef SAMPLE_SORT_H
#define SAMPLE_SORT_H

#include <stdint.h>

static int comes_before(const float *logits, int32_t a, int32_t b)
{
    return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
}

/* Restores a heap whose root alone is out of place; the root of a heap comes last in the order. */
static void sift_down(const float *logits, int32_t *ids, int32_t root, int32_t count)
{
    for (int32_t child = 2 * root + 1; child < count; child = 2 * root + 1) {
        if (child + 1 < count && comes_before(logits, ids[child], ids[child + 1]))
            child++;
        if (!comes_before(logits, ids[root], ids[child]))
            return;
        int32_t id = ids[root];
        ids[root] = ids[child];
        ids[child] = id;
        root = child;
    }
}

/* Heapsort, because a request may ask for the whole vocabulary. */
static void sort_ids(const float *logits, int32_t *ids, int32_t count)
{
    for (int32_t root = count / 2 - 1; root >= 0; root--)
        sift_down(logits, ids, root, count);
    for (int32_t end = count - 1; end > 0; end--) {
        int32_t id = ids[0];
        ids[0] = ids[end];
        ids[end] = id;
        sift_down(logits, ids, 0, end);
    }
}

#endif
