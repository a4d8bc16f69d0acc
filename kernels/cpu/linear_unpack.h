/* Unpacks a block of linear_formats.h in registers. */
#ifndef LINEAR_UNPACK_H
#define LINEAR_UNPACK_H

#include "linear_formats.h"
#include "simd.h"

/* 8-bit weights, stored plus 128, are xored with this; all other integers are below 128. */
enum { SIGN = WEIGHTS_ARE_SIGNED ? 128 : 0 };

INLINE int32_t zero_point(int format)
{
    return format == Q4_0   ? 8
           : format == Q5_0 ? 16
           : format == Q6_K ? 32
           : format == Q8_0 ? 128 - SIGN
                            : 0;
}

INLINE int has_minimum(int format)
{
    return format == Q4_1 || format == Q5_1 || format == Q4_K || format == Q5_K;
}

/* Whether integers have five bits, the fifth stored separately. */
INLINE int has_high_bits(int format) { return format == Q5_0 || format == Q5_1 || format == Q5_K; }

/* Words j (`low`) and j + 4 (`high`) of a block, each with four columns; of its sixteen rows, those
 * of vector p. */
INLINE void unpack_words(int format, const uint8_t *w, int j, int p, u32v *low, u32v *high)
{
    w += 4 * LANES * p;
    if (format == Q8_0) {
        *low = load_bytes(w + 64 * j) ^ (0x01010101u * SIGN);
        *high = load_bytes(w + 64 * (j + 4)) ^ (0x01010101u * SIGN);
        return;
    }
    u32v both = load_bytes(w + 64 * j);
    *low = both & 0x0f0f0f0f;
    *high = (both >> 4) & 0x0f0f0f0f;
    if (has_high_bits(format)) {
        u32v bits = load_bytes(w + 256);
        *low |= (bits << (4 - j)) & 0x10101010;
        *high |= (bits >> j) & 0x10101010;
    }
    if (format == Q6_K) {
        u32v first = load_bytes(w + 256), second = load_bytes(w + 320);
        *low |= (j < 2 ? first << (4 - 2 * j) : first >> (2 * j - 4)) & 0x30303030;
        *high |= (j < 2 ? second << (4 - 2 * j) : second >> (2 * j - 4)) & 0x30303030;
    }
}

/* Bytes of a block's integers, after which its scales follow. */
INLINE int integers_bytes(int format)
{
    return format == Q8_0 ? 512 : has_high_bits(format) ? 320 : format == Q6_K ? 384 : 256;
}

/* Scale and minimum of a block's rows in vector p; in Q6_K, the scale of half `half`. */
INLINE void load_scales(
    int format, const uint8_t *w, const uint8_t *head, int half, int p, f32v *d, f32v *m)
{
    const uint8_t *own = w + integers_bytes(format), *at = head_bytes(format) ? head : own;
    *d = load_f16((const uint16_t *)at + LANES * p);
    *m = *d;
    if (has_minimum(format))
        *m = load_f16((const uint16_t *)(at + 32) + LANES * p);
    if (format == Q4_K || format == Q5_K) {
        *d *= load_u8(own + LANES * p);
        *m *= splat(0) - load_u8(own + 16 + LANES * p);
    }
    if (format == Q6_K)
        *d *= load_i8(own + 16 * half + LANES * p);
}

#endif
