/* Many rows: expands weights to planes of int8, once for all rows, and multiplies them in AMX
 * tiles. */
#ifdef TIER_AMX
#include "amx_tiles.h"
#include "linear_amx_scales.h"
#include "linear_epilogue.h"

/* Shuffles that take the low bytes of 16-bit lanes, each twice, or the high ones. */
INLINE __m512i low_byte_order(void)
{
    return _mm512_set4_epi32(0x0e0e0c0c, 0x0a0a0808, 0x06060404, 0x02020000);
}

INLINE __m512i high_byte_order(void)
{
    return _mm512_set4_epi32(0x0f0f0d0d, 0x0b0b0909, 0x07070505, 0x03030101);
}

/* The low half of each 32-bit lane, in both of its halves. */
INLINE __m512i duplicate_low_half(i32v x)
{
    const __m512i places = _mm512_set4_epi32(0x0d0c0d0c, 0x09080908, 0x05040504, 0x01000100);
    return _mm512_shuffle_epi8((__m512i)x, places);
}

/* Integers as 16-bit lanes: their low byte, and the rest.  Weights of 16 bits are all in `low`. */
typedef struct {
    __m512i low, rest;
} Wide;

INLINE Wide make_wide(const int format, i32v x)
{
    if (weight_planes(format) == 2)
        return (Wide){duplicate_low_half(x), _mm512_setzero_si512()};
    return (Wide){_mm512_and_si512(duplicate_low_half(x), _mm512_set1_epi16(255)),
                  duplicate_low_half(x >> 8)};
}

/* D q + M */
INLINE Wide integer_weights(const int format, __m512i q, Wide D, Wide M)
{
    __m512i low = _mm512_add_epi16(_mm512_mullo_epi16(q, D.low), M.low);
    if (weight_planes(format) == 2)
        return (Wide){low, low};
    __m512i rest = _mm512_add_epi16(_mm512_mullo_epi16(q, D.rest), M.rest);
    return (Wide){low, _mm512_add_epi16(rest, _mm512_srli_epi16(low, 8))};
}

/* Stores four columns of sixteen rows in one plane after the other, the lowest bytes first. */
INLINE void store_planes(const int format, u32v q, Wide D, Wide M, uint8_t *out)
{
    const __mmask64 odd = 0xaaaaaaaaaaaaaaaa, even = ~odd;
    __m512i bytes = (__m512i)q, last = high_byte_order(), first = low_byte_order();
    Wide a = integer_weights(format, _mm512_and_si512(bytes, _mm512_set1_epi16(255)), D, M);
    Wide b = integer_weights(format, _mm512_maskz_shuffle_epi8(even, bytes, last), D, M);
    _mm512_storeu_si512(out, _mm512_mask_shuffle_epi8(a.low, odd, b.low, first));
    out += 16 * STEP_COLUMNS;
    if (weight_planes(format) == 3) {
        _mm512_storeu_si512(out, _mm512_mask_shuffle_epi8(a.rest, odd, b.rest, first));
        out += 16 * STEP_COLUMNS;
    }
    _mm512_storeu_si512(out, _mm512_mask_shuffle_epi8(b.rest, even, a.rest, last));
}

typedef uint8_t Planes[3][16][STEP_COLUMNS]; /* of a step: four columns by sixteen rows each */

/* Expands blocks k and k + 1 to a step's planes; a missing last block becomes 0. */
INLINE void make_planes(
    const int format, const uint8_t *blocks, int k, int num_blocks, f32v inverse, Planes planes)
{
    const size_t size = block_bytes(format);
    for (int i = 0; i < 2; i++, k++) {
        const uint8_t *w = blocks + block_offset(format, k),
                      *head = blocks + head_offset(format, k);
        uint8_t *out = planes[0][8 * i];
        i32v D, M;
        if (k == num_blocks) {
            for (int p = 0; p < weight_planes(format); p++)
                memset(planes[p][8], 0, 8 * STEP_COLUMNS);
            break;
        }
        UNROLL for (size_t u = 0; u < size; u += 64) prefetch_far(w + PREFETCH_L2 + u);
        integer_scales(format, w, head, inverse, 0, &D, &M);
        Wide wide_D = make_wide(format, D), wide_M = make_wide(format, M);
        Wide second_D = wide_D, second_M = wide_M;
        if (format == Q6_K) {
            integer_scales(format, w, head, inverse, 1, &D, &M);
            second_D = make_wide(format, D);
            second_M = make_wide(format, M);
        }
        UNROLL for (int j = 0; j < 4; j++) {
            u32v low, high;
            unpack_words(format, w, j, 0, &low, &high);
            store_planes(format, low, wide_D, wide_M, out + STEP_COLUMNS * j);
            store_planes(format, high, second_D, second_M, out + STEP_COLUMNS * (j + 4));
        }
    }
    __asm__ volatile("" ::: "memory"); /* tile loads name no memory to gcc */
}

/* The next step to expand: block k of the first of the remaining groups. */
typedef struct {
    const uint8_t *group;
    int k, num_groups;
    f32v inverse;
} PlaneCursor;

INLINE void make_next_planes(const int format, PlaneCursor *cursor, int columns, Planes planes)
{
    const int num_blocks = columns / BLOCK_COLUMNS;
    make_planes(
        format, cursor->group + UNITS_BYTES, cursor->k, num_blocks, cursor->inverse, planes);
    cursor->k += 2;
    if (cursor->k < num_blocks)
        return;
    cursor->k = 0;
    cursor->group += group_bytes(format, columns);
    if (--cursor->num_groups > 0)
        cursor->inverse = inverse_units(cursor->group);
}

typedef int32_t TileSums[4][16][16];

/* The sums of a tile and segment that still have to be added to y, or stored through the epilogue
 * if they are the last.  They are reduced while the next ones are multiplied. */
typedef struct {
    int32_t (*sums)[16][16];
    const float *scales;
    int row, R, is_first, is_last;
    float *y, *gate, *out; /* of the tile's first row */
    int out_stride;
    Epilogue epilogue;
    f32v units;
} PendingTile;

INLINE void reduce_row(const int format, PendingTile *pending)
{
    if (pending->row == pending->R)
        return;
    int r = pending->row++;
    float *y = pending->y + GROUP_ROWS * r, *out = pending->out + (int64_t)r * pending->out_stride;
    i32v s[4], total;
    UNROLL for (int i = 0; i <= weight_planes(format); i++) memcpy(&s[i], pending->sums[i][r], 64);
    if (weight_planes(format) == 2)
        total = ((s[1] + (s[0] >> 8)) >> 1) + (s[2] << 7);
    else
        total = ((s[1] + (s[0] >> 8)) >> 8) + s[2] + (s[3] << 8);
    f32v sum = pending->is_first ? splat(0) : load(y);
    sum = fma_v(to_float(total), splat(pending->scales[r]), sum);
    if (pending->is_last)
        apply_epilogue(&pending->epilogue, 0, sum * pending->units, pending->gate + GROUP_ROWS * r,
                       out);
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

INLINE void store_sums(const int format, TileSums sums)
{
    _tile_stored(0, sums[0], STEP_COLUMNS);
    _tile_stored(1, sums[1], STEP_COLUMNS);
    _tile_stored(2, sums[2], STEP_COLUMNS);
    if (weight_planes(format) == 3)
        _tile_stored(3, sums[3], STEP_COLUMNS);
}

/* Multiplies one step of a tile of R rows at x, and reduces two rows of the pending tile. */
INLINE void multiply_step(
    const int format, Planes planes, const uint8_t *x, int R, PendingTile *pending)
{
    _tile_loadd(4, x, STEP_COLUMNS);
    _tile_loadd(6, planes[0], STEP_COLUMNS);
    _tile_loadd(5, x + R * STEP_COLUMNS, STEP_COLUMNS);
    _tile_dpbsud(1, 4, 6);
    _tile_dpbsud(0, 5, 6);
    reduce_row(format, pending);
    _tile_loadd(7, planes[1], STEP_COLUMNS);
    if (weight_planes(format) == 2) {
        _tile_dpbssd(2, 4, 7);
        _tile_dpbssd(1, 5, 7);
        reduce_row(format, pending);
        return;
    }
    _tile_dpbsud(2, 4, 7);
    _tile_dpbsud(1, 5, 7);
    reduce_row(format, pending);
    _tile_loadd(6, planes[2], STEP_COLUMNS);
    _tile_dpbssd(3, 4, 6);
    _tile_dpbssd(2, 5, 6);
}

INLINE void reduce_rest(const int format, PendingTile *pending)
{
    while (pending->row < pending->R)
        reduce_row(format, pending);
}

/* Groups times tiles first .. end - 1.  y[0][row][16] holds gates, and y[g % 2] the sums of several
 * segments.  The first tile of a segment expands each step's planes next to the products of the
 * step before, and the last tile those of the next segment or group.  A single tile needs a ring of
 * only two steps. */
INLINE void gemm(
    const int format,
    const Operation *operation,
    WeightGroups groups,
    int num_rows,
    int first,
    int end,
    float *y)
{
    Planes ring[SEGMENT_COLUMNS / STEP_COLUMNS + 1] __attribute__((aligned(64)));
    TileSums sums[2] __attribute__((aligned(64)));
    const int columns = groups.part->columns,
              ring_size = end - first == 1 ? 2 : SEGMENT_COLUMNS / STEP_COLUMNS + 1;
    const int num_blocks = columns / BLOCK_COLUMNS,
              segment_blocks = segment_steps(columns) * STEP_COLUMNS / BLOCK_COLUMNS;
    const int first_row = tile_start(num_rows, first),
              all_rows = tile_start(num_rows, end) - first_row;
    PlaneCursor cursor = {groups.w, 0, groups.num_groups, inverse_units(groups.w)};
    PendingTile pending = {.out_stride = operation->out_stride};
    int start = 0, turn = 0;
    make_next_planes(format, &cursor, columns, ring[0]);
    for (int g = 0; g < groups.num_groups; g++) {
        const WeightGroups pair = pair_of(groups, g / 2);
        const Epilogue epilogue = make_epilogue(operation, pair, g % 2);
        const f32v group_units = total_units(
            format, pair.w + group_bytes(format, columns) * (size_t)(g % 2));
        for (int i = 0, begin = 0, stop; begin < num_blocks; i++, begin = stop) {
            stop = begin + segment_blocks < num_blocks ? begin + segment_blocks : num_blocks;
            int slot = start;
            for (int tile = first; tile < end; tile++, turn ^= 1) {
                int row = tile_start(num_rows, tile), R = tile_start(num_rows, tile + 1) - row;
                const int32_t *words = tile_at(operation, row);
                const uint8_t *x = (const uint8_t *)words + begin * BLOCK_COLUMNS * 2 * R;
                float *out = output_sums_at(operation, pair, g % 2, row);
                slot = start;
                clear_sums();
                for (int k = begin; k < stop; k += 2, x += 2 * R * STEP_COLUMNS) {
                    int next = slot + 1 < ring_size ? slot + 1 : 0;
                    if (k + 2 < stop ? tile == first : tile == end - 1 && cursor.num_groups > 0)
                        make_next_planes(format, &cursor, columns, ring[next]);
                    for (int r = k - begin; r < k - begin + 2 && r < R; r++)
                        prefetch_write(out + (int64_t)r * operation->out_stride);
                    multiply_step(format, ring[slot], x, R, &pending);
                    slot = next;
                }
                reduce_rest(format, &pending);
                store_sums(format, sums[turn]);
                pending.sums = sums[turn];
                pending.scales = (const float *)(words + scales_at(columns, R)) + i * R;
                pending.row = 0;
                pending.R = R;
                pending.is_first = begin == 0;
                pending.is_last = stop == num_blocks;
                pending.gate = y + GROUP_ROWS * (row - first_row);
                pending.y = pending.gate + GROUP_ROWS * all_rows * (g % 2);
                pending.out = out;
                pending.epilogue = epilogue;
                pending.units = group_units;
            }
            start = slot;
        }
    }
    reduce_rest(format, &pending);
}

/* ---- One function for each format */

typedef void (*Gemm)(
    const Operation *operation, WeightGroups groups, int num_rows, int first, int end, float *y);

#define DEFINE_GEMM(format)                                                                        \
    static void format##_gemm(                                                                     \
        const Operation *operation,                                                                \
        WeightGroups groups,                                                                       \
        int num_rows,                                                                              \
        int first,                                                                                 \
        int end,                                                                                   \
        float *y)                                                                                  \
    {                                                                                              \
        gemm(format, operation, groups, num_rows, first, end, y);                                  \
    }

DEFINE_GEMM(Q4_0)
DEFINE_GEMM(Q4_1)
DEFINE_GEMM(Q5_0)
DEFINE_GEMM(Q5_1)
DEFINE_GEMM(Q8_0)
DEFINE_GEMM(Q4_K)
DEFINE_GEMM(Q5_K)
DEFINE_GEMM(Q6_K)

static const Gemm gemms[NUM_FORMATS] = {
    [Q4_0] = Q4_0_gemm, [Q4_1] = Q4_1_gemm, [Q5_0] = Q5_0_gemm, [Q5_1] = Q5_1_gemm,
    [Q8_0] = Q8_0_gemm, [Q4_K] = Q4_K_gemm, [Q5_K] = Q5_K_gemm, [Q6_K] = Q6_K_gemm,
};

void run_gemm(
    const Operation *operation, WeightGroups groups, int num_rows, int first, int end)
{
    float y[2 * MAX_CHUNK_TILES * TILE_ROWS * GROUP_ROWS] __attribute__((aligned(64)));
    configure_amx_tiles((num_rows + num_tiles(num_rows) - 1) / num_tiles(num_rows));
    gemms[groups.part->format](operation, groups, num_rows, first, end, y);
    _tile_release();
}

#endif
