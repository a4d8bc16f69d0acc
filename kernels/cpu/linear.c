/* LINEAR: cuts products into units of work, and multiplies weights that are floats. */
#include "linear.h"
#include "linear_epilogue.h"
#include "simd.h"

/* Bytes ahead of their use at which weights are prefetched to the L2 cache. */
enum { PREFETCH_L2 = 10240 };

/* Rows multiplied in one pass over a group of floats. */
#ifdef TIER_AVX512
enum { FLOAT_ROWS = 6 };
#else
enum { FLOAT_ROWS = 3 };
#endif

/* y[r] = w x[r] for R rows and the weights of one vector of a group's rows.  Four sums, by column
 * modulo 4, hide the latency of fma. */
INLINE void float_dot(
    const int format,
    const int R,
    const uint8_t *w,
    int columns,
    const float *x,
    int stride,
    float *y)
{
    const size_t size = block_bytes(format);
    f32v sums[4][FLOAT_ROWS];
    UNROLL for (int i = 0; i < 4; i++) UNROLL for (int r = 0; r < R; r++) sums[i][r] = splat(0);
    int c = 0;
#define STEP(i)                                                                                    \
    {                                                                                              \
        const uint8_t *p = w + size * (size_t)(c + i);                                             \
        f32v v = format == F32   ? load((const float *)p)                                          \
                 : format == F16 ? load_f16((const uint16_t *)p)                                   \
                                 : load_bf16((const uint16_t *)p);                                 \
        UNROLL for (int r = 0; r < R; r++) sums[i][r] =                                            \
            fma_v(v, splat(x[r * stride + c + i]), sums[i][r]);                                    \
    }
    for (; c + 4 <= columns; c += 4) {
        if (R == 1)
            UNROLL for (size_t u = 0; u < 4 * size; u += 64)
                prefetch_far(w + size * (size_t)c + PREFETCH_L2 + u);
        UNROLL for (int i = 0; i < 4; i++) STEP(i)
    }
    for (; c < columns; c++)
        STEP(0)
#undef STEP
    UNROLL for (int r = 0; r < R; r++)
        store(y + GROUP_ROWS * r, (sums[0][r] + sums[1][r]) + (sums[2][r] + sums[3][r]));
}

typedef void (*FloatKernel)(const uint8_t *w, int columns, const float *x, int stride, float *y);

#define DEFINE_FLOAT_KERNEL(format, R)                                                             \
    static void format##_##R(const uint8_t *w, int columns, const float *x, int stride, float *y)  \
    {                                                                                              \
        for (int p = 0; p < VECTORS; p++, w += block_bytes(format) / VECTORS, y += LANES)          \
            float_dot(format, R, w, columns, x, stride, y);                                        \
    }

#ifdef TIER_AVX512
#define ROW_COUNTS(M, format)                                                                      \
    M(format, 1) M(format, 2) M(format, 3) M(format, 4) M(format, 5) M(format, 6)
#define NAMES(format) {format##_1, format##_2, format##_3, format##_4, format##_5, format##_6}
#else
#define ROW_COUNTS(M, format) M(format, 1) M(format, 2) M(format, 3)
#define NAMES(format) {format##_1, format##_2, format##_3}
#endif

ROW_COUNTS(DEFINE_FLOAT_KERNEL, F32)
ROW_COUNTS(DEFINE_FLOAT_KERNEL, F16)
ROW_COUNTS(DEFINE_FLOAT_KERNEL, BF16)

static const FloatKernel float_kernels[3][FLOAT_ROWS] = {
    [F32] = NAMES(F32), [F16] = NAMES(F16), [BF16] = NAMES(BF16)};

/* Rows x_row .. x_row + R - 1 of x times a pair of groups, to rows out_row .. of out. */
static void multiply_floats(
    const Operation *operation, WeightGroups pair, int x_row, int out_row, int R)
{
    const WeightPart *part = pair.part;
    size_t size = group_bytes(part->format, part->columns);
    float y[2 * GROUP_ROWS * FLOAT_ROWS] __attribute__((aligned(64)));
    for (int done = 0; done < R; done += FLOAT_ROWS) {
        int count = R - done < FLOAT_ROWS ? R - done : FLOAT_ROWS;
        const float *x = operation->x + (int64_t)(x_row + done) * operation->x_stride;
        for (int g = 0; g < pair.num_groups; g++)
            float_kernels[part->format][count - 1](
                pair.w + (size_t)g * size, part->columns, x, operation->x_stride,
                y + GROUP_ROWS * FLOAT_ROWS * g);
        apply_epilogue_rows(operation, pair, out_row + done, count, y, FLOAT_ROWS);
    }
}

/* ---- Units of work */

/* Tiles in a chunk of rows: as many as stay in the L2 cache while weights stream past. */
static int chunk_tiles(const Operation *operation)
{
    int tiles = CHUNK_BYTES / (tile_words(operation->width) * 4 * TILE_ROWS + 1);
    return tiles < 1 ? 1 : tiles < MAX_CHUNK_TILES ? tiles : MAX_CHUNK_TILES;
}

static int num_pairs_of_part(const WeightPart *part, int queue)
{
    return (part->bounds[queue + 1] - part->bounds[queue] + 1) / 2;
}

int linear_pairs(const Operation *operation, int queue)
{
    int pairs = 0;
    for (int i = 0; i < operation->num_parts; i++)
        pairs += num_pairs_of_part(&operation->parts[i], queue);
    return pairs;
}

int linear_units(const Operation *operation, int num_rows, int queue)
{
    int chunk = chunk_tiles(operation);
    return linear_pairs(operation, queue) * ((num_tiles(num_rows) + chunk - 1) / chunk);
}

/* The pair of groups with number `pair` in a thread's queue, and those after it in the same part,
 * up to pair `end`. */
static WeightGroups weight_groups_at(const WeightPart *part, int queue, int pair, int end)
{
    for (; pair >= num_pairs_of_part(part, queue); part++) {
        pair -= num_pairs_of_part(part, queue);
        end -= num_pairs_of_part(part, queue);
    }
    size_t size = group_bytes(part->format, part->columns);
    int group = part->bounds[queue] + 2 * pair, last = part->bounds[queue] + 2 * end;
    int stop = last < part->bounds[queue + 1] ? last : part->bounds[queue + 1];
    return (WeightGroups){part, part->groups[queue] + 2 * size * (size_t)pair, group, stop - group};
}

static void multiply(
    const Operation *operation, WeightGroups groups, int num_rows, int first, int end)
{
    if (!is_float(groups.part->format)) {
        multiply_tiles(operation, groups, num_rows, first, end);
        return;
    }
    int row = tile_start(num_rows, first), R = tile_start(num_rows, end) - row;
    for (int i = 0; i < num_pairs(groups); i++)
        multiply_floats(operation, pair_of(groups, i), row, row, R);
}

void run_linear(const Operation *operation, int num_rows, int queue, int first, int end)
{
    int pairs = linear_pairs(operation, queue), all = num_tiles(num_rows),
        chunk = chunk_tiles(operation);
    for (int unit = first, count; unit < end; unit += count) {
        int tile = unit / pairs * chunk, pair = unit % pairs;
        int last_pair = pair + end - unit < pairs ? pair + end - unit : pairs;
        WeightGroups groups = weight_groups_at(operation->parts, queue, pair, last_pair);
        multiply(operation, groups, num_rows, tile, tile + chunk < all ? tile + chunk : all);
        count = num_pairs(groups);
    }
}

void run_linear_row(
    const Operation *operation,
    const WeightPart *parts,
    int queue,
    int pair,
    int x_row,
    int out_row)
{
    WeightGroups one = weight_groups_at(parts, queue, pair, pair + 1);
    if (is_float(one.part->format))
        multiply_floats(operation, one, x_row, out_row, 1);
    else
        multiply_row(operation, one, x_row, out_row);
}
