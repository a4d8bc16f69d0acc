/* Writes keys and values to the KV cache, quantized as kv_cache.h says. */
#include "kv_cache.h"
#include "simd.h"

/* The scale of x: the value of 1 in an int8, or in the high byte of 16 bits.  *inverse maps x to
 * integers of at most `most`. */
static float kv_scale(const float *x, int dim, float most, float *inverse)
{
    i32v sizes = splat_int(0);
    for (int i = 0; i < dim; i += LANES)
        sizes = max_int(sizes, abs_bits(load_partial(x + i, lanes_left(dim, i))));
    float largest = float_from_bits(reduce_max_int(sizes));
    *inverse = largest > 0x1p-100f ? most / largest : 0;
    return largest / 127;
}

#if KV_INT8

enum { KV_MAX = KV_BITS == 8 ? 127 : 127 * 256, KV_ZERO_POINT = 1 << (KV_BITS - 1) };

/* Stores a head's keys, or values, at position `offset` of a block: each byte of a lane in its
 * plane. */
static void store_kv_head(
    const float *x, int dim, int padded_dim, int offset, int is_key, uint8_t *head)
{
    float inverse, scale = kv_scale(x, dim, KV_MAX, &inverse);
    int plane_bytes = padded_dim * BLOCK_SIZE;
    memcpy(head + kv_head_bytes(padded_dim) - 4 * (BLOCK_SIZE - offset), &scale, 4);
    for (int i = 0; i < dim; i += 16) {
        i32v q = round_to_int(load_partial(x + i, lanes_left(dim, i)) * splat(inverse))
                 + KV_ZERO_POINT;
        uint8_t *at = head + i * BLOCK_SIZE + KV_BYTES * plane_bytes;
        for (int plane = 0; plane < KV_BYTES; plane++, q >>= 8) {
            at -= plane_bytes;
            if (is_key) {
                uint8_t bytes[16];
                store_low_bytes((int8_t *)bytes, q);
                for (int j = 0; j < 4; j++)
                    memcpy(at + 64 * j + 4 * offset, bytes + 4 * j, 4);
            } else {
                const __mmask64 places = 0x1111111111111111u << offset % 4;
                __m512i shifted = (__m512i)(q << 8 * (offset % 4));
                _mm512_mask_storeu_epi8(at + offset / 4 * 64, places, shifted);
            }
        }
    }
}

#else

static void store_kv_head(
    const float *x, int dim, int padded_dim, int offset, int is_key, uint8_t *head)
{
    float inverse = 1;
    int step = KV_BYTES * (is_key ? BLOCK_SIZE : 1);
    uint8_t *at = head + KV_BYTES * (is_key ? offset : offset * padded_dim);
    if (KV_HAS_SCALES) {
        float scale = kv_scale(x, dim, 127, &inverse);
        memcpy(head + kv_head_bytes(padded_dim) - 4 * (BLOCK_SIZE - offset), &scale, 4);
    }
    for (int i = 0; i < dim; i += LANES) {
        int n = lanes_left(dim, i);
        f32v v = load_partial(x + i, n);
        uint8_t elements[LANES * KV_BYTES];
        if (KV_BITS == 8)
            store_low_bytes((int8_t *)elements, round_to_int(v * splat(inverse)));
        else if (KV_BITS == 16)
            store_f16((uint16_t *)elements, v);
        else
            store((float *)elements, v);
        for (int j = 0; j < n; j++, at += step)
            memcpy(at, elements + j * KV_BYTES, KV_BYTES);
    }
}

#endif

/* Byte offset of the heads of one layer in the block of a slot. */
static int64_t layer_offset(const Plan *plan, int layer, int64_t slot)
{
    int64_t bytes = kv_head_bytes(plan->padded_dim) * plan->num_kv_heads;
    return (slot / BLOCK_SIZE * plan->num_layers + layer) * bytes;
}

void prefetch_kv(const Plan *plan, int layer, int64_t slot)
{
    int64_t at = layer_offset(plan, layer, slot),
            bytes = kv_head_bytes(plan->padded_dim) * plan->num_kv_heads;
    for (int64_t u = at; u < at + bytes; u += 64) {
        prefetch_write(plan->k_cache + u);
        prefetch_write(plan->v_cache + u);
    }
}

void store_kv(const Plan *plan, int layer, int64_t slot, const float *k, const float *v)
{
    int dim = plan->head_dim, padded_dim = plan->padded_dim, offset = (int)(slot % BLOCK_SIZE);
    int64_t at = layer_offset(plan, layer, slot), bytes = kv_head_bytes(padded_dim);
    for (int h = 0; h < plan->num_kv_heads; h++, k += dim, v += dim, at += bytes) {
        store_kv_head(k, dim, padded_dim, offset, 1, plan->k_cache + at);
        store_kv_head(v, dim, padded_dim, offset, 0, plan->v_cache + at);
    }
}
