/* Products on CPUs without dot4, in one of two arithmetics.  With 16 bits: madd of int16 pairs.
 * With 8 bits: products of bytes, whose sums are widened before they overflow (maddubs), or 32 bits
 * long anyway (AVX-VNNI).
 *
 * A word of a block, four columns of sixteen rows (linear_formats.h), becomes two vectors of int16
 * pairs: columns 4 j and 4 j + 2, and columns 4 j + 1 and 4 j + 3, which is where masks and shifts
 * leave them.  With 8 bits it stays as it is.
 *
 * A few rows use words as they come.  For more rows a block is unpacked once, and the rest is the
 * same code for all formats.  That makes 32 rows 1.13 times as fast as groups of four that unpack
 * again, and 4 rows 0.85 times. */
#include "linear_blocks.h"

#if !HAS_DOT4
#include "linear_unpack.h"

/* ---- Activations to tiles */

/* Quantizes 32 values at x to words, `S` apart. */
INLINE void quantize_block_words(const float *x, int S, int32_t *words)
{
    QuantizedBlock block = quantize_block(x);
    int32_t sums[2] = {half_sum(&block, 0), half_sum(&block, 1)};
    float sum = block.d * (float)(sums[0] + sums[1]);
    uint32_t q[BLOCK_COLUMNS];
    memcpy(q, block.q, sizeof q);
    for (int j = 0; j < BLOCK_COLUMNS; j += 4)
        for (int i = j; i < j + PLANES; i++, words += S)
            *words = (int32_t)(PLANES == 2 ? (q[i] & 0xffff) | q[i + 2] << 16
                                           : (q[i] & 255) | (q[i + 1] & 255) << 8
                                                 | (q[i + 2] & 255) << 16 | q[i + 3] << 24);
    memcpy(words, &block.d, sizeof sum);
    memcpy(words + S, &sum, sizeof sum);
    if (PLANES == 1) {
        words[2 * S] = sums[0];
        words[3 * S] = sums[1];
    }
}

void quantize_tile(const float *x, int stride, int width, int R, int32_t *tile)
{
    for (int r = 0; r < R; r++) {
        int first = r / STRIPE_ROWS * STRIPE_ROWS,
            S = R - first < STRIPE_ROWS ? R - first : STRIPE_ROWS;
        for (int k = 0; k < width / BLOCK_COLUMNS; k++)
            quantize_block_words(x + (int64_t)r * stride + BLOCK_COLUMNS * k, S,
                        tile + BLOCK_WORDS * (R * k + first) + r - first);
    }
}

/* ---- Weights */

typedef int16_t i16v __attribute__((vector_size(4 * LANES)));

typedef int8_t i8v __attribute__((vector_size(4 * LANES)));

/* Whether weights are multiplied as signed integers.  With 16 bits Q8_0's and Q6_K's are, or their
 * sums would be large compared to what is left after subtracting the zero point's share.  With 8
 * bits that share is an exact integer. */
INLINE int is_signed(int format) { return format == Q8_0 || (PLANES == 2 && format == Q6_K); }

/* A word in the form that is multiplied. */
INLINE void split_word(int format, u32v word, u32v *out)
{
#if PLANES == 2
    if (format == Q6_K)
        word = (u32v)((i8v)word - 32);
    out[0] = is_signed(format) ? (u32v)((i16v)(word << 8) >> 8) : word & 0x00ff00ff;
    out[1] = (u32v)((i16v)word >> 8); /* other formats have a clear highest bit */
#else
    (void)format;
    out[0] = word;
#endif
}

/* Words j and j + 4 of vector p. */
INLINE void load_words(int format, const uint8_t *w, int j, int p, u32v *first, u32v *second)
{
    u32v low, high;
    unpack_words(format, w, j, p, &low, &high);
    split_word(format, low, first);
    split_word(format, high, second);
}

/* Sums of words; in Q6_K, of the halves of a block separately.  `sums` are 16-bit sums of byte
 * products. */
typedef struct {
    i32v dots[2], sums[2];
} Accumulators;

INLINE int which_half(int format, int word) { return format == Q6_K ? word / 4 : 0; }

INLINE Accumulators zero_accumulators(int format, const int32_t *sums_x, int S)
{
    const i32v zero = splat_int(0);
    if (PLANES == 2 || format != Q6_K)
        return (Accumulators){{zero, zero}, {zero, zero}};
    return (Accumulators){{splat_int(-32 * sums_x[0]), splat_int(-32 * sums_x[S])}, {zero, zero}};
}

/* Adds a word of weights times a row's word; a row's words lie `S` apart. */
INLINE void madd_word(
    int format, int word, const u32v *w, const int32_t *x, int S, Accumulators *accumulators)
{
    i32v *dot = &accumulators->dots[which_half(format, word)];
    x += PLANES * word * S;
#if PLANES == 2
    *dot = madd(*dot, w[0], splat_int(x[0]));
    *dot = madd(*dot, w[1], splat_int(x[S]));
#else
    i32v *sums = &accumulators->sums[which_half(format, word)], v = splat_int(x[0]);
    if (is_signed(format))
        *dot = widen_i8_sums(*dot, add_i8_products(splat_int(0), abs_i8(w[0]), sign_i8(v, w[0])));
    else
        *sums = add_i8_products(*sums, w[0], v);
#endif
}

/* Widens the sums of byte products once 16 bits might not hold another word. */
INLINE void flush_i8_sums(int format, int half, int num_words, Accumulators *accumulators)
{
#if PLANES == 1
    int max_words = format == Q6_K ? 2 : has_high_bits(format) ? 4 : 8;
    if (is_signed(format) || num_words % max_words)
        return;
    accumulators->dots[half] = widen_i8_sums(accumulators->dots[half], accumulators->sums[half]);
    accumulators->sums[half] = splat_int(0);
#else
    (void)format, (void)half, (void)num_words, (void)accumulators;
#endif
}

/* Scales and minima for vector p of sixteen rows; Q6_K has no minima but scales of the halves. */
typedef struct {
    f32v d, m, halves[2];
} BlockScales;

INLINE BlockScales load_block_scales(int format, const uint8_t *w, const uint8_t *head, int p)
{
    BlockScales scales;
    if (format == Q6_K) {
        const uint8_t *own = w + integers_bytes(Q6_K) + LANES * p;
        scales.d = load_f16((const uint16_t *)head + LANES * p);
        scales.halves[0] = load_i8(own);
        scales.halves[1] = load_i8(own + 16);
        return scales;
    }
    load_scales(format, w, head, 0, p, &scales.d, &scales.m);
    if (!has_minimum(format))
        scales.m = scales.d * splat(-(float)zero_point(format));
    return scales;
}

/* y plus a block of weights times a block of a row. */
INLINE f32v scale_and_add(int format,
                          const BlockScales *scales,
                          const Accumulators *accumulators,
                          float d_x,
                          float sum_x,
                          f32v y)
{
    f32v dot = to_float(accumulators->dots[0]);
    if (format == Q6_K) {
        dot = fma_v(to_float(accumulators->dots[1]), scales->halves[1], dot * scales->halves[0]);
        return fma_v(dot, scales->d * splat(d_x), y);
    }
    return fma_v(scales->m, splat(sum_x), fma_v(dot, scales->d * splat(d_x), y));
}

/* ---- A few rows, which are one stripe */

INLINE void multiply_few_rows(
    const int format,
    const int R,
    const uint8_t *blocks,
    int num_blocks,
    const int32_t *tile,
    NextWeights next,
    float *y)
{
    f32v sums[STRIPE_ROWS][VECTORS];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int p = 0; p < VECTORS; p++) sums[r][p] = splat(0);
    for (int k = 0; k < num_blocks; k++, tile += BLOCK_WORDS * R) {
        const uint8_t *w = blocks + block_offset(format, k),
                      *head = blocks + head_offset(format, k);
        const float *d_x = (const float *)(tile + WORDS * R), *sum_x = d_x + R;
        const int32_t *sums_x = tile + (WORDS + 2) * R;
        prefetch_weights(w, block_bytes(format), &next);
        UNROLL for (int p = 0; p < VECTORS; p++) {
            Accumulators accumulators[STRIPE_ROWS];
            UNROLL for (int r = 0; r < R; r++)
                accumulators[r] = zero_accumulators(format, sums_x + r, R);
            UNROLL for (int j = 0; j < 4; j++) {
                u32v words[2][PLANES];
                load_words(format, w, j, p, words[0], words[1]);
                UNROLL for (int r = 0; r < R; r++) {
                    madd_word(format, j, words[0], tile + r, R, &accumulators[r]);
                    madd_word(format, j + 4, words[1], tile + r, R, &accumulators[r]);
                    if (format == Q6_K) {
                        flush_i8_sums(format, 0, j + 1, &accumulators[r]);
                        flush_i8_sums(format, 1, j + 1, &accumulators[r]);
                    } else {
                        flush_i8_sums(format, 0, 2 * (j + 1), &accumulators[r]);
                    }
                }
            }
            BlockScales scales = load_block_scales(format, w, head, p);
            UNROLL for (int r = 0; r < R; r++) sums[r][p] = scale_and_add(
                format, &scales, &accumulators[r], d_x[r], sum_x[r], sums[r][p]);
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int p = 0; p < VECTORS; p++) store(y + GROUP_ROWS * r + LANES * p, sums[r][p]);
}

/* ---- Stripes of rows */

/* An unpacked block of weights. */
typedef struct {
    u32v words[VECTORS][8][PLANES];
    BlockScales scales[VECTORS];
} UnpackedBlock;

INLINE void unpack_block(
    const int format, const uint8_t *w, const uint8_t *head, UnpackedBlock *block)
{
    UNROLL for (int p = 0; p < VECTORS; p++) {
        UNROLL for (int j = 0; j < 4; j++) load_words(
            format, w, j, p, block->words[p][j], block->words[p][j + 4]);
        block->scales[p] = load_block_scales(format, w, head, p);
    }
}

/* y[0 .. S - 1][16] += a block of weights times a stripe.  The sums stay in memory, because the
 * integers take all registers. */
INLINE void add_stripe(
    const int format, const int S, const UnpackedBlock *block, const int32_t *stripe, float *y)
{
    const float *d_x = (const float *)(stripe + WORDS * S), *sum_x = d_x + S;
    const int32_t *sums_x = stripe + (WORDS + 2) * S;
    Accumulators accumulators[STRIPE_ROWS][VECTORS];
    UNROLL for (int r = 0; r < S; r++)
        UNROLL for (int p = 0; p < VECTORS; p++)
            accumulators[r][p] = zero_accumulators(format, sums_x + r, S);
    UNROLL for (int word = 0; word < 8; word++)
        UNROLL for (int r = 0; r < S; r++) UNROLL for (int p = 0; p < VECTORS; p++) {
            madd_word(format, word, block->words[p][word], stripe + r, S, &accumulators[r][p]);
            flush_i8_sums(format, which_half(format, word), word + 1, &accumulators[r][p]);
        }
    UNROLL for (int r = 0; r < S; r++)
        UNROLL for (int p = 0; p < VECTORS; p++) {
            float *at = y + GROUP_ROWS * r + LANES * p;
            store(at, scale_and_add(format, &block->scales[p], &accumulators[r][p], d_x[r],
                                    sum_x[r], load(at)));
        }
}

typedef void (*StripeKernel)(const UnpackedBlock *block, const int32_t *stripe, float *y);

#define DEFINE_STRIPE(format, S)                                                                   \
    static void add_##format##_##S(const UnpackedBlock *block, const int32_t *stripe, float *y)    \
    {                                                                                              \
        add_stripe(format, S, block, stripe, y);                                                   \
    }
#define DEFINE_STRIPES(format)                                                                     \
    DEFINE_STRIPE(format, 1) DEFINE_STRIPE(format, 2)                                              \
    DEFINE_STRIPE(format, 3) DEFINE_STRIPE(format, 4)
#define STRIPE_NAMES(format)                                                                       \
    {add_##format##_1, add_##format##_2, add_##format##_3, add_##format##_4}

/* Most formats are alike once unpacked. */
DEFINE_STRIPES(Q4_0)
DEFINE_STRIPES(Q6_K)
#if PLANES == 1
DEFINE_STRIPES(Q5_0)
DEFINE_STRIPES(Q8_0)
#endif

INLINE const StripeKernel *stripe_kernels(int format)
{
    static const StripeKernel four_bits[] = STRIPE_NAMES(Q4_0), halves[] = STRIPE_NAMES(Q6_K);
#if PLANES == 1
    static const StripeKernel five_bits[] = STRIPE_NAMES(Q5_0), eight_bits[] = STRIPE_NAMES(Q8_0);
    if (format == Q8_0 || has_high_bits(format))
        return format == Q8_0 ? eight_bits : five_bits;
#endif
    return format == Q6_K ? halves : four_bits;
}

INLINE void multiply_stripes(
    const int format,
    const uint8_t *blocks,
    int num_blocks,
    int R,
    const int32_t *tile,
    NextWeights next,
    float *y)
{
    const StripeKernel *stripes = stripe_kernels(format);
    UnpackedBlock block;
    memset(y, 0, sizeof(float) * GROUP_ROWS * (size_t)R);
    for (int k = 0; k < num_blocks; k++) {
        const uint8_t *w = blocks + block_offset(format, k);
        prefetch_weights(w, block_bytes(format), &next);
        unpack_block(format, w, blocks + head_offset(format, k), &block);
        for (int r = 0; r < R; r += STRIPE_ROWS) {
            int S = R - r < STRIPE_ROWS ? R - r : STRIPE_ROWS;
            stripes[S - 1](&block, tile, y + GROUP_ROWS * r);
            tile += BLOCK_WORDS * S;
        }
    }
}

/* ---- One function for each format */

typedef void (*BlockKernel)(
    const uint8_t *w, int num_blocks, int R, const int32_t *tile, NextWeights next, float *y);

#define DEFINE_KERNEL(format)                                                                      \
    static void times_##format(                                                                    \
        const uint8_t *w, int num_blocks, int R, const int32_t *tile, NextWeights next, float *y)  \
    {                                                                                              \
        switch (R) {                                                                               \
        case 1: multiply_few_rows(format, 1, w, num_blocks, tile, next, y); break;                 \
        case 2: multiply_few_rows(format, 2, w, num_blocks, tile, next, y); break;                 \
        case 3: multiply_few_rows(format, 3, w, num_blocks, tile, next, y); break;                 \
        case 4: multiply_few_rows(format, 4, w, num_blocks, tile, next, y); break;                 \
        default: multiply_stripes(format, w, num_blocks, R, tile, next, y);                        \
        }                                                                                          \
    }

DEFINE_KERNEL(Q4_0)
DEFINE_KERNEL(Q4_1)
DEFINE_KERNEL(Q5_0)
DEFINE_KERNEL(Q5_1)
DEFINE_KERNEL(Q8_0)
DEFINE_KERNEL(Q4_K)
DEFINE_KERNEL(Q5_K)
DEFINE_KERNEL(Q6_K)

static const BlockKernel kernels[NUM_FORMATS] = {
    [Q4_0] = times_Q4_0, [Q4_1] = times_Q4_1, [Q5_0] = times_Q5_0, [Q5_1] = times_Q5_1,
    [Q8_0] = times_Q8_0, [Q4_K] = times_Q4_K, [Q5_K] = times_Q5_K, [Q6_K] = times_Q6_K,
};

void multiply_blocks(
    int format,
    const uint8_t *w,
    size_t group_size,
    int num_blocks,
    int R,
    const int32_t *tile,
    NextWeights next,
    float *y)
{
    for (int g = 0; g < 2; g++)
        kernels[format](w + g * group_size, num_blocks, R, tile, next, y + GROUP_ROWS * R * g);
}

#endif
