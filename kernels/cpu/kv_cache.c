/* Keys and values to the cache. */
#include "kv_cache.h"
#include "simd.h"

INLINE int lanes_left(int dim, int i) { return dim - i < 16 ? dim - i : 16; }

/* The scale of integers up to `most`, and what to multiply by for them. */
static float scale_of(const float *x, int dim, float most, float *inverse)
{
    i32x16 sizes = splat_int(0);
    for (int i = 0; i < dim; i += 16)
        sizes = max_int(sizes, size_bits(load_first(x + i, lanes_left(dim, i))));
    float largest = float_of(largest_int(sizes));
    *inverse = largest > 0x1p-100f ? most / largest : 0;
    return largest / 127;
}

#if KV_INTEGERS

enum { MOST = KV_BITS == 8 ? 127 : 127 * 256, OFFSET = 1 << (KV_BITS - 1) };

/* One position: word i of four dimensions, or values 16 i .. 16 i + 15, at `at`. */
static void store_keys(const float *x, int dim, int padded_dim, float inverse, uint8_t *at)
{
    for (int i = 0; i < dim; i += 16) {
        i32x16 q = to_nearest(load_first(x + i, lanes_left(dim, i)) * splat(inverse)) + OFFSET;
        for (int plane = KV_BYTES; plane-- > 0; q >>= 8) {
            int8_t bytes[16];
            store_bytes(bytes, q);
            for (int j = 0; j < 4; j++)
                memcpy(at + plane * padded_dim * BLOCK_SIZE + (i / 4 + j) * 64, bytes + 4 * j, 4);
        }
    }
}

static void store_values(const float *x, int dim, int padded_dim, float inverse, uint8_t *at)
{
    for (int i = 0; i < dim; i += 16) {
        i32x16 q = to_nearest(load_first(x + i, lanes_left(dim, i)) * splat(inverse)) + OFFSET;
        for (int plane = KV_BYTES; plane-- > 0; q >>= 8) {
            uint8_t bytes[16], *first = at + (plane * padded_dim + i) * BLOCK_SIZE;
            store_bytes((int8_t *)bytes, q);
            for (int j = 0; j < 16; j++)
                first[4 * j] = bytes[j];
        }
    }
}

static void store_head(
    const float *k, const float *v, int dim, int padded_dim, int offset, uint8_t *keys, uint8_t *values)
{
    int scales = padded_dim * BLOCK_SIZE * KV_BYTES + 4 * offset;
    float inverse, scale = scale_of(k, dim, MOST, &inverse);
    memcpy(keys + scales, &scale, 4);
    store_keys(k, dim, padded_dim, inverse, keys + 4 * offset);
    scale = scale_of(v, dim, MOST, &inverse);
    memcpy(values + scales, &scale, 4);
    store_values(v, dim, padded_dim, inverse, values + offset / 4 * 64 + offset % 4);
}

#else

/* `dim` values to numbers 0, step, 2 step .. */
static void store_elements(const float *x, int dim, int step, float inverse, uint8_t *at)
{
    for (int i = 0; i < dim; i += 16) {
        int n = lanes_left(dim, i);
        f32x16 v = load_first(x + i, n);
        uint8_t stored[16 * KV_BYTES];
        if (KV_BITS == 8)
            store_bytes((int8_t *)stored, to_nearest(v * splat(inverse)));
        else if (KV_BITS == 16)
            store_half((uint16_t *)stored, v);
        else
            store((float *)stored, v);
        if (step == 1)
            memcpy(at + i * KV_BYTES, stored, (size_t)(n * KV_BYTES));
        else
            for (int j = 0; j < n; j++)
                memcpy(at + (i + j) * step * KV_BYTES, stored + j * KV_BYTES, KV_BYTES);
    }
}

static void store_head(
    const float *k, const float *v, int dim, int padded_dim, int offset, uint8_t *keys, uint8_t *values)
{
    float *scales[] = {(float *)kv_scales(keys, padded_dim), (float *)kv_scales(values, padded_dim)};
    float inverse = 1;
    if (KV_HAS_SCALES)
        scales[0][offset] = scale_of(k, dim, 127, &inverse);
    store_elements(k, dim, BLOCK_SIZE, inverse, keys + offset * KV_BYTES);
    if (KV_HAS_SCALES)
        scales[1][offset] = scale_of(v, dim, 127, &inverse);
    store_elements(v, dim, 1, inverse, values + offset * padded_dim * KV_BYTES);
}

#endif

void store_kv(const Plan *plan, int layer, int64_t slot, const float *k, const float *v)
{
    int dim = plan->head_dim, heads = plan->num_kv_heads;
    int64_t bytes = kv_head_bytes(plan->padded_dim);
    int64_t at = (slot / BLOCK_SIZE * plan->num_layers + layer) * heads * bytes;
    for (int h = 0; h < heads; h++, k += dim, v += dim, at += bytes)
        store_head(k, v, dim, plan->padded_dim, (int)(slot % BLOCK_SIZE), plan->k_cache + at,
                   plan->v_cache + at);
}
