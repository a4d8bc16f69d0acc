/* Attention with int8 planes: chooses between dot products of four bytes, for few queries, and AMX
 * tiles, for many. */
#include "attention_planes.h"

#if KV_INT8

/* ---- What all passes share: scales of keys and of values [KV_CHUNK], repacked values */

int64_t kv_range_floats(int padded_dim) { return 2 * KV_CHUNK + repacked_v_bytes(padded_dim) / 4; }

void prepare_kv_range(const QueryTile *queries, float *memory, KVRange *range)
{
    const int dim = queries->plan->padded_dim;
    range->k_scales = memory;
    range->v_scales = memory + KV_CHUNK;
    range->repacked_v = (uint8_t *)(memory + 2 * KV_CHUNK);
    for (int position = range->begin; position < range->end; position += BLOCK_SIZE) {
        int at = chunk_offset(position), left = range->end - position;
        store(memory + at, load(kv_scales(kv_block(range, range->k, position), dim)));
        /* Positions after the last belong to others, who may have left NaN there. */
        const float *scales = kv_scales(kv_block(range, range->v, position), dim);
        store(memory + KV_CHUNK + at, load_partial(scales, left));
    }
    if (uses_amx(queries, queries->count))
        repack_values(range, dim);
}

int pass_size(const QueryTile *queries, int left)
{
    if (uses_amx(queries, left))
        return left < MAX_PASS_QUERIES ? left : MAX_PASS_QUERIES;
    return left >= LARGE_PASS ? LARGE_PASS : left < SMALL_PASS ? left : SMALL_PASS;
}

void attention_chunk(
    const QueryTile *queries, int first, int N, const KVRange *range, float *m, float *l, float *o)
{
    if (uses_amx(queries, N))
        attend_amx(N, queries, first, range, m, l, o);
    else
        attend_dot4(N, queries, first, range, m, l, o);
}

#endif
