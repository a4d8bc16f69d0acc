/* The formats of weights on the device, and how tensor cores get them.
 *
 * A matrix [rows, columns] is cut into tiles of 16 rows by BLOCKS blocks of 32 columns, zero beyond
 * its edges.  A tile lies in planes; in each it is contiguous, and so are its rows:
 *     values        64 bytes a row: 4 pieces of 16 bytes; piece t holds columns 8 t .. 8 t + 7 of each
 *                   block (in Q6_K: 4 t .. 4 t + 3 and 16 + 4 t .. 16 + 4 t + 3), block after block
 *     high          bits of the values above their low 4, for each piece a word or two
 *     scales        for each block of a row
 *     super_scales  for each row and 256 columns, of the K types
 * Plane [row tile, column tile, row, ...], super_scales [row tile, columns / 256, row, ...].
 *
 *     format  BLOCKS  a value is              a piece has                 scales    super_scales
 *     T16        1    itself                  8 T16
 *     Q8_0       2    d q                     8 int8 a block              half d
 *     Q4_0       4    d (q - 8)               a word a block              half d
 *     Q4_1       4    d q + m                 the same                    half d, m
 *     Q5_0       4    d (q - 16)              the same, high: 1 word      half d
 *     Q5_1       4    d q + m                 the same                    half d, m
 *     Q4_K       4    d s q - m t             as Q4_0                     uint8 s, t   half d, m
 *     Q5_K       4    d s q - m t             as Q5_0                     uint8 s, t   half d, m
 *     Q6_K       4    d s (q - 32)            as Q4_0, high: 2 words      int8 s[2]    half d
 * s[2]: for columns 0 .. 15 and 16 .. 31 of the block.  A word of 8 values c0 .. c7 has the low 4 bits
 * of c0 c2 c4 c6 in its low half, from the lowest bit on, and of c1 c3 c5 c7 in its high half, so
 * that a shift and a mask give a pair of neighbours.  The high bits are arranged in the same way:
 * in Q5, bit 4 b + i belongs to c(2i) of block b, bit 16 + 4 b + i to c(2i + 1); in Q6_K two bits each,
 * blocks 0 and 1 in the first word, 2 and 3 in the second.
 *
 * Why so: in mma m16n8k16 with the weights as `a`, lane 4 g + t needs rows g and g + 8, and any four
 * columns of 16 as long as `b` has the same four.  So one 16-byte load a row gives a lane all that it
 * needs, a warp's load is 512 contiguous bytes, and neither weights nor activations are shuffled.
 * Integers are exact in both 16-bit types, so few rows multiply integers and scale the sums of each
 * block in float32: nothing is lost beyond the file's own quantization. */

#define TILE_ROWS 16
#define BLOCK_COLUMNS 32

struct Planes {
    const unsigned char *values, *high, *scales, *super_scales;
};

/* ---- Integers as T16 */

#ifdef BFLOAT16
#define BIAS_BITS 0x43004300u /* a pair of 128; a bfloat16 there has units of 1 in its 7 low bits */
#else
#define BIAS_BITS 0x64006400u /* a pair of 1024; a float16 there has units of 1 in its 10 low bits */
#endif

union T16Pair {
    unsigned bits;
    T16x2 values;
};

__device__ __forceinline__ unsigned sub_pairs(unsigned a, unsigned b)
{
    T16Pair x, y;
    x.bits = a;
    y.bits = b;
    x.values = __hsub2(x.values, y.values);
    return x.bits;
}

/* a * scale + minimum, all of them pairs. */
__device__ __forceinline__ unsigned fma_pairs(unsigned a, unsigned scale, unsigned minimum)
{
    T16Pair x, y, z;
    x.bits = a;
    y.bits = scale;
    z.bits = minimum;
    x.values = __hfma2(x.values, y.values, z.values);
    return x.bits;
}

/* 0, but the compiler does not know. */
__device__ __forceinline__ unsigned hidden_zero() { return threadIdx.y; }

/* The mask of the lowest 4 bits of both halves.  An instruction takes one constant, so a constant mask
 * would be loaded again for each use; this one stays in a register. */
__device__ __forceinline__ unsigned nibble_mask() { return 0x000f000fu + hidden_zero(); }

/* A pair q - OFFSET; q is in bits 0 .. 6 of both halves of `fields`, all else is 0. */
template <int OFFSET> __device__ __forceinline__ unsigned pair_of_fields(unsigned fields)
{
    return sub_pairs(fields | BIAS_BITS, BIAS_BITS + OFFSET * 0x10001u);
}

/* The value twice; it must be in the range of T16. */
__device__ __forceinline__ unsigned pair_of_float(float value)
{
    T16Pair pair;
#ifdef BFLOAT16
    pair.values = __float2bfloat162_rn(value);
#else
    pair.values = __float2half2_rn(value);
#endif
    return pair.bits;
}

/* Bytes `first` and first + 1 of four int8, as a pair. */
__device__ __forceinline__ unsigned pair_of_int8(unsigned bytes, int first)
{
#ifdef BFLOAT16
    /* The sign has weight -128: (128 + low 7 bits) - (128 or 256). */
    unsigned spread = __byte_perm(bytes, 0, first ? 0x4342 : 0x4140);
    return sub_pairs(spread & 0x007f007fu | BIAS_BITS, spread & 0x00800080u | BIAS_BITS);
#else
    unsigned biased = bytes ^ 0x80808080u;
    return sub_pairs(__byte_perm(biased, 0x64, first ? 0x4342 : 0x4140), 0x64806480u);
#endif
}

/* The bits of `mask` after a shift to the left, or to the right if negative. */
__device__ __forceinline__ unsigned shifted(unsigned bits, int left, unsigned mask)
{
    return (left >= 0 ? bits << left : bits >> -left) & mask;
}

__device__ __forceinline__ float half_at(const unsigned *words, int i)
{
    union { unsigned short bits; __half value; } half;
    half.bits = (unsigned short)(words[i / 2] >> (16 * (i % 2)));
    return __half2float(half.value);
}

/* factor * byte `i` of the word, for a factor of 11 bits.  2^23 + byte is a float whose low bits are the
 * byte; the fma drops the 2^23 again.  This is exact, and cheaper than a conversion. */
__device__ __forceinline__ float times_byte(float factor, unsigned word, int i)
{
    float biased = __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440 + i));
    return __fmaf_rn(factor, biased, factor * -8388608.0f);
}

/* The same for a signed byte: it is 128 less than the byte with its sign bit flipped. */
__device__ __forceinline__ float times_int8(float factor, unsigned word, int i)
{
    return __fmaf_rn(factor, -128.0f, times_byte(factor, word ^ 0x80808080u, i));
}

template <int WORDS>
__device__ __forceinline__ void load_words(unsigned *words, const void *plane, long long index)
{
    if constexpr (WORDS == 1)
        words[0] = ((const unsigned *)plane)[index];
    if constexpr (WORDS == 2) {
        uint2 two = ((const uint2 *)plane)[index];
        words[0] = two.x;
        words[1] = two.y;
    }
    if constexpr (WORDS == 4) {
        uint4 four = ((const uint4 *)plane)[index];
        words[0] = four.x;
        words[1] = four.y;
        words[2] = four.z;
        words[3] = four.w;
    }
}

/* `index` counts pieces.  IS_STREAMED: from global memory, not to be read again soon. */
template <bool IS_STREAMED>
__device__ __forceinline__ void load_values(
    unsigned *words, const unsigned char *plane, long long index)
{
    const uint4 *piece = (const uint4 *)plane + index;
    uint4 four = IS_STREAMED ? load_once(piece) : *piece;
    words[0] = four.x;
    words[1] = four.y;
    words[2] = four.z;
    words[3] = four.w;
}

/* ---- Formats
 * What a lane holds of one row of a tile.
 *     load      piece `piece` of row `row` of the planes, counted over all tiles; super_row counts
 *               the rows of super_scales
 *     integers  the 8 values of a block without scale and minimum, as 4 pairs
 *     scale, minimum  of a block, of its first or second half: value = integer * scale + minimum
 *     IN_FLIGHT  tiles that a lane of linear.cu loads before it uses the first
 *     HIGH_BYTES, SCALE_BYTES, SUPER_BYTES  of a row in these planes */

struct RowT16 {
    static constexpr int BLOCKS = 1, IN_FLIGHT = 4;
    static constexpr int HIGH_BYTES = 0, SCALE_BYTES = 0, SUPER_BYTES = 0;
    static constexpr bool HAS_SCALES = false, HAS_MINIMA = false, IS_HALVED = false;
    unsigned values[4];

    template <bool IS_STREAMED>
    __device__ __forceinline__ void load(
        const Planes &planes, long long row, long long super_row, int piece)
    {
        load_values<IS_STREAMED>(values, planes.values, row * 4 + piece);
    }
    __device__ __forceinline__ void integers(int block, unsigned *pairs) const
    {
#pragma unroll
        for (int i = 0; i < 4; i++)
            pairs[i] = values[i] + hidden_zero(); /* see fragments_a */
    }
    __device__ __forceinline__ float scale(int block, int half) const { return 1.0f; }
    __device__ __forceinline__ float minimum(int block) const { return 0.0f; }
};

struct RowQ8_0 {
    static constexpr int BLOCKS = 2, IN_FLIGHT = 4;
    static constexpr int HIGH_BYTES = 0, SCALE_BYTES = 4, SUPER_BYTES = 0;
    static constexpr bool HAS_SCALES = true, HAS_MINIMA = false, IS_HALVED = false;
    unsigned values[4], scales[1];

    template <bool IS_STREAMED>
    __device__ __forceinline__ void load(
        const Planes &planes, long long row, long long super_row, int piece)
    {
        load_values<IS_STREAMED>(values, planes.values, row * 4 + piece);
        load_words<1>(scales, planes.scales, row);
    }
    __device__ __forceinline__ void integers(int block, unsigned *pairs) const
    {
#pragma unroll
        for (int i = 0; i < 4; i++)
            pairs[i] = pair_of_int8(values[2 * block + i / 2], 2 * (i % 2));
    }
    __device__ __forceinline__ float scale(int block, int half) const
    {
        return half_at(scales, block);
    }
    __device__ __forceinline__ float minimum(int block) const { return 0.0f; }
};

/* Q4_0, Q4_1, Q5_0, Q5_1 */
template <int OFFSET, bool HAS_FIFTH_BIT, bool HAS_MINIMUM> struct RowQ45 {
    static constexpr int BLOCKS = 4, IN_FLIGHT = HAS_MINIMUM ? 2 : 4;
    static constexpr int HIGH_BYTES = HAS_FIFTH_BIT ? 16 : 0, SCALE_BYTES = HAS_MINIMUM ? 16 : 8, SUPER_BYTES = 0;
    static constexpr bool HAS_SCALES = true, HAS_MINIMA = HAS_MINIMUM, IS_HALVED = false;
    unsigned values[4], high[1], scales[HAS_MINIMUM ? 4 : 2];

    template <bool IS_STREAMED>
    __device__ __forceinline__ void load(
        const Planes &planes, long long row, long long super_row, int piece)
    {
        load_values<IS_STREAMED>(values, planes.values, row * 4 + piece);
        load_words<HAS_MINIMUM ? 4 : 2>(scales, planes.scales, row);
        if constexpr (HAS_FIFTH_BIT)
            load_words<1>(high, planes.high, row * 4 + piece);
    }
    __device__ __forceinline__ void integers(int block, unsigned *pairs) const
    {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            unsigned fields = values[block] >> (4 * i) & nibble_mask();
            if constexpr (HAS_FIFTH_BIT)
                fields |= shifted(high[0], 4 - (4 * block + i), 0x00100010u);
            pairs[i] = pair_of_fields<OFFSET>(fields);
        }
    }
    __device__ __forceinline__ float scale(int block, int half) const
    {
        return half_at(scales, HAS_MINIMUM ? 2 * block : block);
    }
    __device__ __forceinline__ float minimum(int block) const
    {
        return HAS_MINIMUM ? half_at(scales, 2 * block + 1) : 0.0f;
    }
};

typedef RowQ45<8, false, false> RowQ4_0;
typedef RowQ45<0, false, true> RowQ4_1;
typedef RowQ45<16, true, false> RowQ5_0;
typedef RowQ45<0, true, true> RowQ5_1;

/* Q4_K, Q5_K */
template <bool HAS_FIFTH_BIT> struct RowQ45_K {
    static constexpr int BLOCKS = 4, IN_FLIGHT = 2;
    static constexpr int HIGH_BYTES = HAS_FIFTH_BIT ? 16 : 0, SCALE_BYTES = 8, SUPER_BYTES = 4;
    static constexpr bool HAS_SCALES = true, HAS_MINIMA = true, IS_HALVED = false;
    unsigned values[4], high[1], scales[2], super_scales[1];

    template <bool IS_STREAMED>
    __device__ __forceinline__ void load(
        const Planes &planes, long long row, long long super_row, int piece)
    {
        load_values<IS_STREAMED>(values, planes.values, row * 4 + piece);
        load_words<2>(scales, planes.scales, row);
        load_words<1>(super_scales, planes.super_scales, super_row);
        if constexpr (HAS_FIFTH_BIT)
            load_words<1>(high, planes.high, row * 4 + piece);
    }
    __device__ __forceinline__ void integers(int block, unsigned *pairs) const
    {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            unsigned fields = values[block] >> (4 * i) & nibble_mask();
            if constexpr (HAS_FIFTH_BIT)
                fields |= shifted(high[0], 4 - (4 * block + i), 0x00100010u);
            pairs[i] = pair_of_fields<0>(fields);
        }
    }
    __device__ __forceinline__ float scale(int block, int half) const
    {
        return times_byte(half_at(super_scales, 0), scales[block / 2], 2 * (block % 2));
    }
    __device__ __forceinline__ float minimum(int block) const
    {
        return times_byte(-half_at(super_scales, 1), scales[block / 2], 2 * (block % 2) + 1);
    }
};

typedef RowQ45_K<false> RowQ4_K;
typedef RowQ45_K<true> RowQ5_K;

struct RowQ6_K {
    static constexpr int BLOCKS = 4, IN_FLIGHT = 2;
    static constexpr int HIGH_BYTES = 32, SCALE_BYTES = 8, SUPER_BYTES = 2;
    static constexpr bool HAS_SCALES = true, HAS_MINIMA = false, IS_HALVED = true;
    unsigned values[4], high[2], scales[2];
    __half super_scale;

    template <bool IS_STREAMED>
    __device__ __forceinline__ void load(
        const Planes &planes, long long row, long long super_row, int piece)
    {
        load_values<IS_STREAMED>(values, planes.values, row * 4 + piece);
        load_words<2>(high, planes.high, row * 4 + piece);
        load_words<2>(scales, planes.scales, row);
        super_scale = ((const __half *)planes.super_scales)[super_row];
    }
    __device__ __forceinline__ void integers(int block, unsigned *pairs) const
    {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            unsigned fields = values[block] >> (4 * i) & nibble_mask();
            fields |= shifted(high[block / 2], 4 - 2 * (4 * (block % 2) + i), 0x00300030u);
            pairs[i] = pair_of_fields<32>(fields);
        }
    }
    __device__ __forceinline__ float scale(int block, int half) const
    {
        return times_int8(__half2float(super_scale), scales[block / 2], 2 * (block % 2) + half);
    }
    __device__ __forceinline__ float minimum(int block) const { return 0.0f; }
};

/* FORMAT is a macro of the module, such as -DFORMAT=Q4_K. */
#define PASTED(prefix, format) prefix##format
#define ROW_OF(format) PASTED(Row, format)
typedef ROW_OF(FORMAT) Row;

/* ---- Fragments of mma m16n8k16: the first of a pair is for half the columns of a block, the second
 * for the others. */

/* The first column of pair i of a piece, counted from the block's first. */
__device__ __forceinline__ int column_of_pair(int piece, int i)
{
    return Row::IS_HALVED ? 16 * (i / 2) + 4 * piece + 2 * (i % 2) : 8 * piece + 2 * i;
}

/* `a` from the pairs of rows g and g + 8.  The four registers of `a` must be neighbours, which those of
 * a 16-byte load are already, in another order.  ptxas would move loaded values to their place for
 * every mma again, but it computes values right there: so T16 adds a zero. */
__device__ __forceinline__ void fragments_a(
    unsigned (*a)[4], const unsigned *first_row, const unsigned *second_row)
{
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            a[half][i] = (i % 2 ? second_row : first_row)[2 * half + i / 2];
}

/* `b` from the 32 columns of row g of x that belong to the block. */
__device__ __forceinline__ void fragments_b(unsigned *b, const T16 *x, int piece)
{
    if constexpr (Row::IS_HALVED) {
        load_words<2>(b, x, piece);
        load_words<2>(b + 2, x + 16, piece);
    } else {
        load_words<4>(b, x, piece);
    }
}

/* The values of a block as T16, rounded: 4 pairs. */
__device__ __forceinline__ void dequantize(const Row &row, int block, unsigned *pairs)
{
    row.integers(block, pairs);
    if constexpr (Row::HAS_SCALES) {
        unsigned minimum = Row::HAS_MINIMA ? pair_of_float(row.minimum(block)) : 0;
#pragma unroll
        for (int i = 0; i < 4; i++)
            pairs[i] = fma_pairs(pairs[i], pair_of_float(row.scale(block, i / 2)), minimum);
    }
}
