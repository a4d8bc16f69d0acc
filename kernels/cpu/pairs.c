/* Products with activations of 16 bits, two at a time, where dot2 multiplies pairs of them.
 *
 * A word of a block, four columns of sixteen rows (formats.h), becomes two vectors of pairs: columns
 * 4 j and 4 j + 2, and 4 j + 1 and 4 j + 3, which is where masks and shifts leave them.  A few rows take
 * them as they come.  For more a block is taken apart once, and what is left to do is the same for all
 * formats: 32 rows are 1.13 times as fast so as in fours that take them as they come, 4 rows 0.85. */
#include "blocks.h"

#if !HAS_DOT4
#include "products.h"
#include "unpack.h"

/* A tile of R rows is cut into blocks of 32 columns, and each of these into stripes of STRIPE rows, of
 * which the last has what is left.  A stripe of S rows is
 *     int32  words[16][S]  the pairs of one word after the other
 *     float  d[S]          what 1 of these integers is worth
 *     float  sum[S]        of the 32 values */
enum { WORDS = 16, BLOCK_WORDS = WORDS + 2 /* a row and block */ };

/* ---- Activations to tiles */

/* Words of 32 values at x, `S` apart. */
INLINE void split_block(const float *x, int S, int32_t *words)
{
    Integers integers = integers_of(x);
    float sum = integers.d * (float)(sum_of_half(&integers, 0) + sum_of_half(&integers, 1));
    uint32_t q[COLUMNS];
    memcpy(q, integers.q, sizeof q);
    for (int j = 0; j < COLUMNS; j += 4)
        for (int i = j; i < j + 2; i++, words += S)
            *words = (int32_t)((q[i] & 0xffff) | q[i + 2] << 16);
    memcpy(words, &integers.d, sizeof sum);
    memcpy(words + S, &sum, sizeof sum);
}

int tile_words(int width) { return width / COLUMNS * BLOCK_WORDS; }

void split_tile(const float *x, int stride, int width, int R, int32_t *tile)
{
    for (int r = 0; r < R; r++) {
        int first = r / STRIPE * STRIPE, S = R - first < STRIPE ? R - first : STRIPE;
        for (int k = 0; k < width / COLUMNS; k++)
            split_block(x + (int64_t)r * stride + COLUMNS * k, S,
                        tile + BLOCK_WORDS * (R * k + first) + r - first);
    }
}

/* ---- Weights */

typedef int16_t i16v __attribute__((vector_size(4 * LANES)));

/* Pairs of a word: columns 0 and 2, and 1 and 3.  Those of Q6_K become signed, and Q8_0's bytes are
 * so: else their sums would be large beside what is left of them once the offset's share is off. */
INLINE void pairs_of(int format, u32v word, u32v *pairs)
{
    pairs[0] = format == Q8_0 ? (u32v)((i16v)(word << 8) >> 8) : word & 0x00ff00ff;
    pairs[1] = (u32v)((i16v)word >> 8); /* of all others the highest bit is 0 */
    if (format == Q6_K) {
        pairs[0] = (u32v)((i16v)pairs[0] - 32);
        pairs[1] = (u32v)((i16v)pairs[1] - 32);
    }
}

/* Those of words j and j + 4 of part p. */
INLINE void take_pairs(int format, const uint8_t *w, int j, int p, u32v *pairs)
{
    u32v low, high;
    integers(format, w, j, p, &low, &high);
    pairs_of(format, low, pairs);
    pairs_of(format, high, pairs + 2);
}

/* Of one part of sixteen rows the scales and minima; of Q6_K no minima, but scales of the halves. */
typedef struct {
    f32v d, m, halves[2];
} Scales;

INLINE Scales scales_of(int format, const uint8_t *w, const uint8_t *head, int p)
{
    Scales of;
    if (format == Q6_K) {
        const uint8_t *own = w + integers_bytes(Q6_K) + LANES * p;
        of.d = load_half((const uint16_t *)head + LANES * p);
        of.halves[0] = load_signed_bytes(own);
        of.halves[1] = load_signed_bytes(own + 16);
        return of;
    }
    scales(format, w, head, 0, p, &of.d, &of.m);
    if (!has_minimum(format))
        of.m = of.d * splat(-(float)offset_of(format));
    return of;
}

/* y and what a block of weights adds to it, times one of a row: of the dot product, or those of the
 * halves. */
INLINE f32v added(int has_halves, const Scales *of, const i32v *dots, float d_x, float sum_x, f32v y)
{
    if (has_halves) {
        f32v both = fma_v(to_float(dots[1]), of->halves[1], to_float(dots[0]) * of->halves[0]);
        return fma_v(both, of->d * splat(d_x), y);
    }
    return fma_v(of->m, splat(sum_x), fma_v(to_float(dots[0]), of->d * splat(d_x), y));
}

/* ---- A few rows, which are one stripe */

INLINE void multiply_few(
    const int format, const int R, const uint8_t *blocks, int num_blocks, const int32_t *tile, Next next,
    float *y)
{
    const int other = format == Q6_K; /* which dot product has the second half */
    f32v sums[STRIPE][PARTS];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < PARTS; p++) sums[r][p] = splat(0);
    for (int k = 0; k < num_blocks; k++, tile += BLOCK_WORDS * R) {
        const uint8_t *w = blocks + block_at(format, k), *head = blocks + head_at(format, k);
        const float *d_x = (const float *)(tile + WORDS * R), *sum_x = d_x + R;
        fetch_ahead(w, block_bytes(format), &next);
        UNROLL for (int p = 0; p < PARTS; p++) {
            i32v dots[STRIPE][2];
            UNROLL for (int r = 0; r < R; r++) dots[r][0] = dots[r][1] = splat_int(0);
            UNROLL for (int j = 0; j < 4; j++) {
                u32v pairs[4];
                take_pairs(format, w, j, p, pairs);
                UNROLL for (int i = 0; i < 2; i++) UNROLL for (int r = 0; r < R; r++) {
                    const int32_t *x = tile + (2 * j + i) * R + r;
                    dots[r][0] = dot2(dots[r][0], pairs[i], splat_int(*x));
                    dots[r][other] = dot2(dots[r][other], pairs[2 + i], splat_int(x[8 * R]));
                }
            }
            Scales of = scales_of(format, w, head, p);
            UNROLL for (int r = 0; r < R; r++)
                sums[r][p] = added(format == Q6_K, &of, dots[r], d_x[r], sum_x[r], sums[r][p]);
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int p = 0; p < PARTS; p++) store(y + ROWS * r + LANES * p, sums[r][p]);
}

/* ---- Stripes of rows */

/* A block of weights taken apart. */
typedef struct {
    u32v pairs[WORDS][PARTS];
    Scales scales[PARTS];
} Taken;

INLINE void take(const int format, const uint8_t *w, const uint8_t *head, Taken *taken)
{
    UNROLL for (int p = 0; p < PARTS; p++) {
        UNROLL for (int j = 0; j < 4; j++) {
            u32v pairs[4];
            take_pairs(format, w, j, p, pairs);
            UNROLL for (int i = 0; i < 2; i++) {
                taken->pairs[2 * j + i][p] = pairs[i];
                taken->pairs[8 + 2 * j + i][p] = pairs[2 + i];
            }
        }
        taken->scales[p] = scales_of(format, w, head, p);
    }
}

/* Words first .. last - 1 of a block times those of S rows. */
INLINE void dot_products(
    const int S, const Taken *taken, const int32_t *stripe, int first, int last, i32v (*dots)[PARTS])
{
    i32v sums[STRIPE][PARTS];
    UNROLL for (int r = 0; r < S; r++)
        UNROLL for (int p = 0; p < PARTS; p++) sums[r][p] = splat_int(0);
    for (int i = first; i < last; i++)
        UNROLL for (int r = 0; r < S; r++) {
            i32v x = splat_int(stripe[i * S + r]);
            UNROLL for (int p = 0; p < PARTS; p++) sums[r][p] = dot2(sums[r][p], taken->pairs[i][p], x);
        }
    UNROLL for (int r = 0; r < S; r++)
        UNROLL for (int p = 0; p < PARTS; p++) dots[r][p] = sums[r][p];
}

/* y[0 .. S - 1][16] += a block of weights times a stripe; the sums stay in memory, for the integers
 * take all registers. */
INLINE void add_stripe(
    const int has_halves, const int S, const Taken *taken, const int32_t *stripe, float *y)
{
    const float *d_x = (const float *)(stripe + WORDS * S), *sum_x = d_x + S;
    i32v dots[2][STRIPE][PARTS];
    dot_products(S, taken, stripe, 0, has_halves ? WORDS / 2 : WORDS, dots[0]);
    if (has_halves)
        dot_products(S, taken, stripe, WORDS / 2, WORDS, dots[1]);
    UNROLL for (int r = 0; r < S; r++)
        UNROLL for (int p = 0; p < PARTS; p++) {
            i32v both[2] = {dots[0][r][p], has_halves ? dots[1][r][p] : splat_int(0)};
            float *at = y + ROWS * r + LANES * p;
            store(at, added(has_halves, &taken->scales[p], both, d_x[r], sum_x[r], load(at)));
        }
}

typedef void (*AddStripe)(const Taken *taken, const int32_t *stripe, float *y);

#define STRIPE_OF(S)                                                                               \
    static void add_##S(const Taken *taken, const int32_t *stripe, float *y)                       \
    {                                                                                              \
        add_stripe(0, S, taken, stripe, y);                                                        \
    }                                                                                              \
    static void add_halves_##S(const Taken *taken, const int32_t *stripe, float *y)                \
    {                                                                                              \
        add_stripe(1, S, taken, stripe, y);                                                        \
    }

STRIPE_OF(1)
STRIPE_OF(2)
STRIPE_OF(3)
STRIPE_OF(4)

static const AddStripe adds[2][STRIPE] = {
    {add_1, add_2, add_3, add_4}, {add_halves_1, add_halves_2, add_halves_3, add_halves_4}};

INLINE void multiply_rows(
    const int format, const uint8_t *blocks, int num_blocks, int R, const int32_t *tile, Next next, float *y)
{
    Taken taken;
    memset(y, 0, sizeof(float) * ROWS * (size_t)R);
    for (int k = 0; k < num_blocks; k++) {
        const uint8_t *w = blocks + block_at(format, k);
        fetch_ahead(w, block_bytes(format), &next);
        take(format, w, blocks + head_at(format, k), &taken);
        for (int r = 0; r < R; r += STRIPE) {
            int S = R - r < STRIPE ? R - r : STRIPE;
            adds[format == Q6_K][S - 1](&taken, tile, y + ROWS * r);
            tile += BLOCK_WORDS * S;
        }
    }
}

/* ---- One function for each format */

typedef void (*Product)(
    const uint8_t *w, int num_blocks, int R, const int32_t *tile, Next next, float *y);

#define ONE(format)                                                                                \
    static void times_##format(                                                                    \
        const uint8_t *w, int num_blocks, int R, const int32_t *tile, Next next, float *y)         \
    {                                                                                              \
        switch (R) {                                                                               \
        case 1: multiply_few(format, 1, w, num_blocks, tile, next, y); break;                      \
        case 2: multiply_few(format, 2, w, num_blocks, tile, next, y); break;                      \
        case 3: multiply_few(format, 3, w, num_blocks, tile, next, y); break;                      \
        case 4: multiply_few(format, 4, w, num_blocks, tile, next, y); break;                      \
        default: multiply_rows(format, w, num_blocks, R, tile, next, y);                           \
        }                                                                                          \
    }

ONE(Q4_0)
ONE(Q4_1)
ONE(Q5_0)
ONE(Q5_1)
ONE(Q8_0)
ONE(Q4_K)
ONE(Q5_K)
ONE(Q6_K)

static const Product products[NUM_FORMATS] = {
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
    Next next,
    float *y)
{
    for (int g = 0; g < 2; g++)
        products[format](w + g * group_size, num_blocks, R, tile, next, y + ROWS * R * g);
}

#endif
