/* Products of quantised weights with activations of 16 bits, in integers, on matrix registers.
 *
 * A weight is D q + M units: each row has its unit, and each block its scale and minimum in it, as
 * integers D and M.  Weights of four bits come out 16 bits long, the others 23.  Activations are cut
 * into stretches of up to 640 columns, each of integers with one scale.  Then
 *
 *     y[r][i] = unit[i] * sum over stretches s of  scale[r][s] float(total)
 *     total   = sum over blocks of  D (q . x) + M sum(x),  less its last bits
 *
 * where the integers are exact however they are summed: few rows multiply q as it lies in memory and
 * sum in 64 bits, at the speed of memory; many rows multiply D q + M, made once for all of them, two
 * or three planes of bytes by two of the activations.  So neither the number of rows nor the tiles
 * change a bit of y.
 *
 * A matrix register has 16 rows of 64 bytes (Intel 64 and IA-32 Software Developer's Manual, volume 1,
 * chapter 18).  Its products take bytes from two of them, four columns of sixteen rows side by side in
 * the second: just what a vector of linear_formats.h holds. */
#ifdef TIER_AMX
#include "linear_finish.h"
#include "amx_tiles.h"
#include "linear_unpack.h"

enum {
    AHEAD = 10240, NEAR = 2048, /* as in linear_products.c */
};

/* ---- Activations to tiles */

/* The largest size of x[0..count-1], a multiple of 32; infinity and NaN are larger than all. */
INLINE float largest_of(const float *x, int count)
{
    i32v largest = splat_int(0);
    for (int i = 0; i < count; i += 16)
        largest = max_int(largest, size_bits(load(x + i)));
    return float_of(largest_int(largest));
}

/* Columns first .. end - 1 of row r of R; the tile's scale for them is returned. */
INLINE float split_stretch(const float *x, int first, int end, int width, int r, int R, int32_t *tile)
{
    float largest = largest_of(x + first, end - first);
    int is_finite = largest < INFINITY;
    f32v inverse = splat(is_finite && largest > 0x1p-100f ? 32512 / largest : 0);
    int32_t *sums = tile + sums_at(width, R) + r;
    for (int c = first; c < end; c += 16) {
        f32v value = is_finite ? load(x + c) : splat(0);
        i32v q = to_nearest(value * inverse);
        int8_t *out = (int8_t *)tile + (2 * (c / STEP) * R + r) * STEP + c % STEP;
        store_bytes(out, (q + 128) >> 8);
        store_bytes(out + STEP * R, q);
        if (R <= FEW)
            sums[c / 16 * R] = sum_int(q);
    }
    return is_finite ? largest / 32512 : NAN;
}

static void split_row(const float *x, int width, int r, int R, int32_t *tile)
{
    int columns = stretch_steps(width) * STEP;
    float *scales = (float *)(tile + scales_at(width, R)) + r;
    for (int first = 0; first < width; first += columns, scales += R) {
        int end = first + columns < width ? first + columns : width;
        *scales = split_stretch(x, first, end, width, r, R, tile);
    }
    if (width % STEP) {
        int8_t *rest = (int8_t *)tile + (2 * (width / STEP) * R + r) * STEP + STEP / 2;
        memset(rest, 0, STEP / 2);
        memset(rest + STEP * R, 0, STEP / 2);
    }
}

void split_tile(const float *x, int stride, int width, int R, int32_t *tile)
{
    for (int r = 0; r < R; r++)
        split_row(x + (int64_t)r * stride, width, r, R, tile);
}

/* ---- Weights as integers */

INLINE f32v inverse_units(const uint8_t *group)
{
    return splat(1) / load((const float *)group);
}

/* Bits of a total that are left off, so that 32 hold it: as many as the weights' length allows. */
INLINE int shift_of(const int format) { return weight_planes(format) == 2 ? 9 : 16; }

/* What a total counts. */
INLINE f32v units(const int format, const uint8_t *group)
{
    return load((const float *)group) * splat((float)(1 << shift_of(format)));
}

/* D and M of a block's half, the same for both halves but in Q6_K; M counts for q without offset.
 * What D lost when it was rounded is in M for a q in the middle of four bits. */
INLINE void integer_scales(
    const int format,
    const uint8_t *w,
    const uint8_t *head,
    f32v inverse,
    const int half,
    i32v *D,
    i32v *M)
{
    f32v d, m;
    scales(format, w, head, half, 0, &d, &m);
    d *= inverse;
    m = has_minimum(format) ? m * inverse : splat(0);
    *D = to_nearest(d);
    if (weight_planes(format) == 2)
        m += (d - to_float(*D)) * splat(7.5f - (float)offset_of(format));
    /* Unsigned, for what is not a number may overflow. */
    *M = (i32v)((u32v)to_nearest(m) - (u32v)*D * (uint32_t)offset_of(format));
}

/* ---- Few rows */

typedef struct {
    __m512i even, odd; /* 64-bit sums of eight rows of weights each */
} Totals;

/* totals += a * b, lane by lane, of which b's odd lanes are also at odd_b's even ones. */
INLINE void add_products(Totals *totals, i32v a, i32v b, __m512i odd_b)
{
    __m512i odd_a = _mm512_srli_epi64((__m512i)a, 32);
    totals->even = _mm512_add_epi64(totals->even, _mm512_mul_epi32((__m512i)a, (__m512i)b));
    totals->odd = _mm512_add_epi64(totals->odd, _mm512_mul_epi32(odd_a, odd_b));
}

/* The totals of sixteen rows without their last bits. */
INLINE f32v shortened(const Totals *totals, const int shift)
{
    __m512i even = _mm512_srai_epi64(totals->even, shift), odd = _mm512_srai_epi64(totals->odd, shift);
    return to_float((i32v)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32)));
}

/* D (q . x) + M sum(x) of words first .. last - 1 of a block, for R rows. */
INLINE void add_half(
    const int R,
    const int first,
    const int last,
    const u32v *q,
    i32v D,
    i32v M,
    const int32_t *words,
    const int32_t *sums,
    Totals *totals)
{
    __m512i odd_D = _mm512_srli_epi64((__m512i)D, 32), odd_M = _mm512_srli_epi64((__m512i)M, 32);
    i32v high[FEW], low[FEW];
    UNROLL for (int r = 0; r < R; r++) high[r] = low[r] = splat_int(0);
    UNROLL for (int j = first; j < last; j++) UNROLL for (int r = 0; r < R; r++) {
        high[r] = dot4(high[r], q[j], splat_int(words[16 * r + j]));
        low[r] = dot4(low[r], q[j], splat_int(words[16 * (R + r) + j]));
    }
    UNROLL for (int r = 0; r < R; r++) {
        i32v sum = splat_int(sums[r]);
        if (last - first == 8)
            sum += splat_int(sums[R + r]);
        add_products(&totals[r], (high[r] << 8) + low[r], D, odd_D);
        add_products(&totals[r], sum, M, odd_M);
    }
}

/* y[r][0..15] of one group and R <= FEW rows, in units. */
INLINE void few_rows(
    const int format, const int R, const uint8_t *group, int columns, const int32_t *tile, float *y)
{
    const size_t size = block_bytes(format);
    const int num_blocks = columns / COLUMNS, stretch = stretch_steps(columns) * STEP / COLUMNS;
    const int32_t *sums = tile + sums_at(columns, R);
    const float *scale = (const float *)(tile + scales_at(columns, R));
    const f32v inverse = inverse_units(group);
    const uint8_t *blocks = group + UNITS_BYTES;
    f32v sum[FEW];
    UNROLL for (int r = 0; r < R; r++) sum[r] = splat(0);
    for (int k = 0; k < num_blocks; scale += R) {
        Totals totals[FEW];
        UNROLL for (int r = 0; r < R; r++) totals[r].even = totals[r].odd = _mm512_setzero_si512();
        int end = k + stretch < num_blocks ? k + stretch : num_blocks;
        for (; k < end; k++, sums += 2 * R) {
            const uint8_t *w = blocks + block_at(format, k), *head = blocks + head_at(format, k);
            const int32_t *words = tile + k / 2 * 32 * R + k % 2 * 8;
            u32v q[8];
            i32v D, M;
            UNROLL for (size_t u = 0; u < size; u += 64) {
                prefetch(w + NEAR + u);
                prefetch_far(w + AHEAD + u);
            }
            UNROLL for (int j = 0; j < 4; j++) integers(format, w, j, 0, &q[j], &q[j + 4]);
            integer_scales(format, w, head, inverse, 0, &D, &M);
            if (format != Q6_K) {
                add_half(R, 0, 8, q, D, M, words, sums, totals);
                continue;
            }
            add_half(R, 0, 4, q, D, M, words, sums, totals);
            integer_scales(format, w, head, inverse, 1, &D, &M);
            add_half(R, 4, 8, q, D, M, words, sums + R, totals);
        }
        UNROLL for (int r = 0; r < R; r++) {
            f32v total = shortened(&totals[r], shift_of(format));
            sum[r] = fma_v(total, splat(scale[r]), sum[r]);
        }
    }
    UNROLL for (int r = 0; r < R; r++) store(y + ROWS * r, sum[r] * units(format, group));
}

/* ---- Many rows */

/* The low bytes of 16-bit lanes, twice, or the high ones. */
INLINE __m512i low_bytes(void)
{
    return _mm512_set4_epi32(0x0e0e0c0c, 0x0a0a0808, 0x06060404, 0x02020000);
}

INLINE __m512i high_bytes(void)
{
    return _mm512_set4_epi32(0x0f0f0d0d, 0x0b0b0909, 0x07070505, 0x03030101);
}

/* The low half of each lane in both of its halves. */
INLINE __m512i doubled(i32v x)
{
    const __m512i places = _mm512_set4_epi32(0x0d0c0d0c, 0x09080908, 0x05040504, 0x01000100);
    return _mm512_shuffle_epi8((__m512i)x, places);
}

/* Integers as 16-bit lanes of their low byte and of the rest; of 16-bit weights `low` is all. */
typedef struct {
    __m512i low, rest;
} Wide;

INLINE Wide split_wide(const int format, i32v x)
{
    if (weight_planes(format) == 2)
        return (Wide){doubled(x), _mm512_setzero_si512()};
    return (Wide){_mm512_and_si512(doubled(x), _mm512_set1_epi16(255)), doubled(x >> 8)};
}

/* D q + M */
INLINE Wide weights_of(const int format, __m512i q, Wide D, Wide M)
{
    __m512i low = _mm512_add_epi16(_mm512_mullo_epi16(q, D.low), M.low);
    if (weight_planes(format) == 2)
        return (Wide){low, low};
    __m512i rest = _mm512_add_epi16(_mm512_mullo_epi16(q, D.rest), M.rest);
    return (Wide){low, _mm512_add_epi16(rest, _mm512_srli_epi16(low, 8))};
}

/* Four columns and sixteen rows, to one plane after the other: lowest bytes first. */
INLINE void store_planes(const int format, u32v q, Wide D, Wide M, uint8_t *out)
{
    const __mmask64 odd = 0xaaaaaaaaaaaaaaaa, even = ~odd;
    __m512i bytes = (__m512i)q, last = high_bytes(), first = low_bytes();
    Wide a = weights_of(format, _mm512_and_si512(bytes, _mm512_set1_epi16(255)), D, M);
    Wide b = weights_of(format, _mm512_maskz_shuffle_epi8(even, bytes, last), D, M);
    _mm512_storeu_si512(out, _mm512_mask_shuffle_epi8(a.low, odd, b.low, first));
    out += 16 * STEP;
    if (weight_planes(format) == 3) {
        _mm512_storeu_si512(out, _mm512_mask_shuffle_epi8(a.rest, odd, b.rest, first));
        out += 16 * STEP;
    }
    _mm512_storeu_si512(out, _mm512_mask_shuffle_epi8(b.rest, even, a.rest, last));
}

typedef uint8_t Planes[3][16][STEP]; /* of a step: four columns by sixteen rows each */

/* A step's planes of blocks k and k + 1; they are 0 where there are no more. */
INLINE void make_planes(
    const int format, const uint8_t *blocks, int k, int num_blocks, f32v inverse, Planes planes)
{
    const size_t size = block_bytes(format);
    for (int i = 0; i < 2; i++, k++) {
        const uint8_t *w = blocks + block_at(format, k), *head = blocks + head_at(format, k);
        uint8_t *out = planes[0][8 * i];
        i32v D, M;
        if (k == num_blocks) {
            for (int p = 0; p < weight_planes(format); p++)
                memset(planes[p][8], 0, 8 * STEP);
            break;
        }
        UNROLL for (size_t u = 0; u < size; u += 64) prefetch_far(w + AHEAD + u);
        integer_scales(format, w, head, inverse, 0, &D, &M);
        Wide wide_D = split_wide(format, D), wide_M = split_wide(format, M);
        Wide second_D = wide_D, second_M = wide_M;
        if (format == Q6_K) {
            integer_scales(format, w, head, inverse, 1, &D, &M);
            second_D = split_wide(format, D);
            second_M = split_wide(format, M);
        }
        UNROLL for (int j = 0; j < 4; j++) {
            u32v low, high;
            integers(format, w, j, 0, &low, &high);
            store_planes(format, low, wide_D, wide_M, out + STEP * j);
            store_planes(format, high, second_D, second_M, out + STEP * (j + 4));
        }
    }
    __asm__ volatile("" ::: "memory"); /* loads of matrix registers name no memory to gcc */
}

/* The step whose planes are made next: of block k of the first of the groups that are left. */
typedef struct {
    const uint8_t *group;
    int k, num_groups;
    f32v inverse;
} Making;

INLINE void make_next(const int format, Making *making, int columns, Planes planes)
{
    const int num_blocks = columns / COLUMNS;
    make_planes(
        format, making->group + UNITS_BYTES, making->k, num_blocks, making->inverse, planes);
    making->k += 2;
    if (making->k < num_blocks)
        return;
    making->k = 0;
    making->group += group_bytes(format, columns);
    if (--making->num_groups > 0)
        making->inverse = inverse_units(making->group);
}

typedef int32_t Sums[4][16][16];

/* The sums of a tile and stretch that are still to be added to y, or finished if they are the last,
 * while the next are multiplied. */
typedef struct {
    int32_t (*sums)[16][16];
    const float *scales;
    int row, R, is_first, is_last;
    float *y, *gate, *out; /* of the tile's first row */
    int out_stride;
    Finish finish;
    f32v units;
} Folding;

INLINE void fold_row(const int format, Folding *folding)
{
    if (folding->row == folding->R)
        return;
    int r = folding->row++;
    float *y = folding->y + ROWS * r, *out = folding->out + (int64_t)r * folding->out_stride;
    i32v s[4], total;
    UNROLL for (int i = 0; i <= weight_planes(format); i++) memcpy(&s[i], folding->sums[i][r], 64);
    if (weight_planes(format) == 2)
        total = ((s[1] + (s[0] >> 8)) >> 1) + (s[2] << 7);
    else
        total = ((s[1] + (s[0] >> 8)) >> 8) + s[2] + (s[3] << 8);
    f32v sum = folding->is_first ? splat(0) : load(y);
    sum = fma_v(to_float(total), splat(folding->scales[r]), sum);
    if (folding->is_last)
        finish_row(&folding->finish, 0, sum * folding->units, folding->gate + ROWS * r, out);
    else
        store(y, sum);
}

INLINE void clear_sums(void)
{
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

INLINE void store_sums(const int format, Sums sums)
{
    _tile_stored(0, sums[0], STEP);
    _tile_stored(1, sums[1], STEP);
    _tile_stored(2, sums[2], STEP);
    if (weight_planes(format) == 3)
        _tile_stored(3, sums[3], STEP);
}

/* One step of a tile of R rows at x; two rows of another one are folded meanwhile. */
INLINE void multiply_step(
    const int format, Planes planes, const uint8_t *x, int R, Folding *folding)
{
    _tile_loadd(4, x, STEP);
    _tile_loadd(6, planes[0], STEP);
    _tile_loadd(5, x + R * STEP, STEP);
    _tile_dpbsud(1, 4, 6);
    _tile_dpbsud(0, 5, 6);
    fold_row(format, folding);
    _tile_loadd(7, planes[1], STEP);
    if (weight_planes(format) == 2) {
        _tile_dpbssd(2, 4, 7);
        _tile_dpbssd(1, 5, 7);
        fold_row(format, folding);
        return;
    }
    _tile_dpbsud(2, 4, 7);
    _tile_dpbsud(1, 5, 7);
    fold_row(format, folding);
    _tile_loadd(6, planes[2], STEP);
    _tile_dpbssd(3, 4, 6);
    _tile_dpbssd(2, 5, 6);
}

INLINE void fold_rest(const int format, Folding *folding)
{
    while (folding->row < folding->R)
        fold_row(format, folding);
}

/* Groups times tiles first .. end - 1.  y[0][row][16] keeps gates, and y[g % 2] sums of several
 * stretches.  Planes are made beside the products of the step before, by the first tile, and for the
 * next stretch or group by the last one; a ring of two serves a single tile. */
INLINE void many_rows(
    const int format,
    const Operation *operation,
    Groups groups,
    int num_rows,
    int first,
    int end,
    float *y)
{
    Planes ring[STRETCH / STEP + 1] __attribute__((aligned(64)));
    Sums sums[2] __attribute__((aligned(64)));
    const int columns = groups.part->columns, ring_size = end - first == 1 ? 2 : STRETCH / STEP + 1;
    const int num_blocks = columns / COLUMNS, stretch_blocks = stretch_steps(columns) * STEP / COLUMNS;
    const int first_row = tile_start(num_rows, first), all_rows = tile_start(num_rows, end) - first_row;
    Making making = {groups.w, 0, groups.num_groups, inverse_units(groups.w)};
    Folding folding = {.out_stride = operation->out_stride};
    int start = 0, turn = 0;
    make_next(format, &making, columns, ring[0]);
    for (int g = 0; g < groups.num_groups; g++) {
        const Groups pair = pair_of(groups, g / 2);
        const Finish finish = finish_of(operation, pair, g % 2);
        const f32v group_units = units(format, pair.w + group_bytes(format, columns) * (size_t)(g % 2));
        for (int i = 0, begin = 0, stop; begin < num_blocks; i++, begin = stop) {
            stop = begin + stretch_blocks < num_blocks ? begin + stretch_blocks : num_blocks;
            int slot = start;
            for (int tile = first; tile < end; tile++, turn ^= 1) {
                int row = tile_start(num_rows, tile), R = tile_start(num_rows, tile + 1) - row;
                const int32_t *words = tile_at(operation, row);
                const uint8_t *x = (const uint8_t *)words + begin * COLUMNS * 2 * R;
                float *out = out_at(operation, pair, g % 2, row);
                slot = start;
                clear_sums();
                for (int k = begin; k < stop; k += 2, x += 2 * R * STEP) {
                    int next = slot + 1 < ring_size ? slot + 1 : 0;
                    if (k + 2 < stop ? tile == first : tile == end - 1 && making.num_groups > 0)
                        make_next(format, &making, columns, ring[next]);
                    for (int r = k - begin; r < k - begin + 2 && r < R; r++)
                        prefetch_write(out + (int64_t)r * operation->out_stride);
                    multiply_step(format, ring[slot], x, R, &folding);
                    slot = next;
                }
                fold_rest(format, &folding);
                store_sums(format, sums[turn]);
                folding.sums = sums[turn];
                folding.scales = (const float *)(words + scales_at(columns, R)) + i * R;
                folding.row = 0;
                folding.R = R;
                folding.is_first = begin == 0;
                folding.is_last = stop == num_blocks;
                folding.gate = y + ROWS * (row - first_row);
                folding.y = folding.gate + ROWS * all_rows * (g % 2);
                folding.out = out;
                folding.finish = finish;
                folding.units = group_units;
            }
            start = slot;
        }
    }
    fold_rest(format, &folding);
}

/* ---- One function for each format */

typedef void (*FewRows)(const uint8_t *group, int columns, const int32_t *tile, float *y);
typedef void (*ManyRows)(
    const Operation *operation, Groups groups, int num_rows, int first, int end, float *y);

#define FEW_ROWS(format, R)                                                                        \
    static void format##_##R(const uint8_t *group, int columns, const int32_t *tile, float *y)     \
    {                                                                                              \
        few_rows(format, R, group, columns, tile, y);                                              \
    }

#define ALL(format)                                                                                \
    FEW_ROWS(format, 1)                                                                            \
    FEW_ROWS(format, 2)                                                                            \
    FEW_ROWS(format, 3)                                                                            \
    FEW_ROWS(format, 4)                                                                            \
    static void format##_many(                                                                     \
        const Operation *operation, Groups groups, int num_rows, int first, int end, float *y)     \
    {                                                                                              \
        many_rows(format, operation, groups, num_rows, first, end, y);                             \
    }

ALL(Q4_0)
ALL(Q4_1)
ALL(Q5_0)
ALL(Q5_1)
ALL(Q8_0)
ALL(Q4_K)
ALL(Q5_K)
ALL(Q6_K)

#define NAMES(format) [format] = {format##_1, format##_2, format##_3, format##_4}
static const FewRows few[NUM_FORMATS][FEW] = {NAMES(Q4_0), NAMES(Q4_1), NAMES(Q5_0), NAMES(Q5_1),
                                              NAMES(Q8_0), NAMES(Q4_K), NAMES(Q5_K), NAMES(Q6_K)};
static const ManyRows many[NUM_FORMATS] = {
    [Q4_0] = Q4_0_many, [Q4_1] = Q4_1_many, [Q5_0] = Q5_0_many, [Q5_1] = Q5_1_many,
    [Q8_0] = Q8_0_many, [Q4_K] = Q4_K_many, [Q5_K] = Q5_K_many, [Q6_K] = Q6_K_many,
};

/* ---- Groups times tiles */

/* A pair of groups times R <= FEW rows, a tile, from `row` on. */
static void multiply_few(const Operation *operation, Groups pair, int row, int R, const int32_t *tile)
{
    const Part *part = pair.part;
    size_t size = group_bytes(part->format, part->columns);
    float y[2 * FEW * ROWS] __attribute__((aligned(64)));
    for (int g = 0; g < pair.num_groups; g++)
        few[part->format][R - 1](pair.w + (size_t)g * size, part->columns, tile, y + ROWS * R * g);
    finish_sums(operation, pair, row, R, y, R);
}

void multiply_tiles(const Operation *operation, Groups groups, int num_rows, int first, int end)
{
    int row = tile_start(num_rows, first), R = tile_start(num_rows, end) - row;
    if (R <= FEW) {
        for (int i = 0; i < num_pairs(groups); i++)
            multiply_few(operation, pair_of(groups, i), row, R, tile_at(operation, row));
        return;
    }
    float y[2 * MAX_CHUNK_TILES * TILE * ROWS] __attribute__((aligned(64)));
    use_matrix_registers((num_rows + num_tiles(num_rows) - 1) / num_tiles(num_rows));
    many[groups.part->format](operation, groups, num_rows, first, end, y);
    _tile_release();
}

void multiply_row(const Operation *operation, Groups pair, int x_row, int out_row)
{
    multiply_few(operation, pair, out_row, 1, tile_at(operation, x_row));
}

#endif
