/* Attention in int8: chooses between dot products of four bytes, for few queries, and AMX tiles. */
#include "attention_int8.h"

#if KV_INTEGERS

/* ---- What calls share: scales of keys and of values [CHUNK], gathered values */

int64_t shared_floats(int padded_dim) { return 2 * CHUNK + gathered_bytes(padded_dim) / 4; }

void share_range(const Queries *queries, float *memory, Range *range)
{
    const int dim = queries->plan->padded_dim;
    range->scales[0] = memory;
    range->scales[1] = memory + CHUNK;
    range->gathered = (uint8_t *)(memory + 2 * CHUNK);
    for (int position = range->begin; position < range->end; position += BLOCK_SIZE) {
        int at = in_chunk(position), left = range->end - position;
        store(memory + at, load(kv_scales(block_of(range, range->k, position), dim)));
        /* What lies behind the last position is of others, who may have left NaN there. */
        const float *scales = kv_scales(block_of(range, range->v, position), dim);
        store(memory + CHUNK + at, load_first(scales, left));
    }
    if (takes_many(queries, queries->count))
        gather_values(range, dim);
}

int queries_taken(const Queries *queries, int left)
{
    if (takes_many(queries, left))
        return left < MOST_QUERIES ? left : MOST_QUERIES;
    return left >= SOME ? SOME : left < FEW ? left : FEW;
}

void attend_chunk(
    const Queries *queries, int first, int N, const Range *range, float *m, float *l, float *o)
{
    if (takes_many(queries, N))
        attend_many(N, queries, first, range, m, l, o);
    else
        attend_dot4(N, queries, first, range, m, l, o);
}

#endif
