/* Repacks rows of a file's tensors into the groups of linear_formats.h; the values stay the same.
 *
 * The file's blocks are those of ggml-common.h.  A K block has 256 columns and becomes eight. */
#include "linear_pack.h"
#include "simd.h"

static uint16_t u16_at(const uint8_t *p) { return (uint16_t)(p[0] | p[1] << 8); }

static void unpack_nibbles(uint8_t *q, const uint8_t *p)
{
    for (int i = 0; i < 16; i++) {
        q[i] = p[i] & 15;
        q[16 + i] = p[i] >> 4;
    }
}

static void unpack_high_bits(uint8_t *q, const uint8_t *p)
{
    for (int i = 0; i < 32; i++)
        q[i] |= (uint8_t)((p[i / 8] >> i % 8 & 1) << 4);
}

/* Six-bit scale and minimum of sub-block `i`: whole for the first four, in two parts for the
 * others. */
static void unpack_scales_k4(FileBlock *block, const uint8_t *p, int i)
{
    if (i < 4) {
        block->s = p[i] & 63;
        block->t = p[i + 4] & 63;
    } else {
        block->s = (uint8_t)((p[i + 4] & 15) | p[i - 4] >> 6 << 4);
        block->t = (uint8_t)(p[i + 4] >> 4 | p[i] >> 6 << 4);
    }
}

static void unpack_k4(FileBlock *block, const uint8_t *p, const uint8_t *q, int i)
{
    block->d = u16_at(p);
    block->m = u16_at(p + 2);
    unpack_scales_k4(block, p + 4, i);
    for (int c = 0; c < 32; c++)
        block->q[c] = i % 2 ? q[32 * (i / 2) + c] >> 4 : q[32 * (i / 2) + c] & 15;
}

static void unpack_k6(FileBlock *block, const uint8_t *p, int i)
{
    const uint8_t *low = p + 64 * (i / 4) + 32 * (i % 2), *high = p + 128 + 32 * (i / 4);
    for (int c = 0; c < 32; c++) {
        int four = i % 4 < 2 ? low[c] & 15 : low[c] >> 4;
        block->q[c] = (uint8_t)(four | (high[c] >> 2 * (i % 4) & 3) << 4);
    }
    block->s = p[192 + 2 * i];
    block->t = p[193 + 2 * i];
    block->d = u16_at(p + 208);
}

FileBlock unpack_file_block(int format, const uint8_t *row, int k)
{
    FileBlock block = {{0}, 0, 0, 0, 0};
    switch (format) {
    case Q4_0:
        row += 18 * k;
        block.d = u16_at(row);
        unpack_nibbles(block.q, row + 2);
        break;
    case Q4_1:
        row += 20 * k;
        block.d = u16_at(row);
        block.m = u16_at(row + 2);
        unpack_nibbles(block.q, row + 4);
        break;
    case Q5_0:
        row += 22 * k;
        block.d = u16_at(row);
        unpack_nibbles(block.q, row + 6);
        unpack_high_bits(block.q, row + 2);
        break;
    case Q5_1:
        row += 24 * k;
        block.d = u16_at(row);
        block.m = u16_at(row + 2);
        unpack_nibbles(block.q, row + 8);
        unpack_high_bits(block.q, row + 4);
        break;
    case Q8_0:
        row += 34 * k;
        block.d = u16_at(row);
        for (int i = 0; i < 32; i++)
            block.q[i] = row[2 + i] ^ 128;
        break;
    case Q4_K:
        row += 144 * (k / 8);
        unpack_k4(&block, row, row + 16, k % 8);
        break;
    case Q5_K:
        row += 176 * (k / 8);
        unpack_k4(&block, row, row + 48, k % 8);
        for (int i = 0; i < 32; i++)
            block.q[i] |= (uint8_t)((row[16 + i] >> k % 8 & 1) << 4);
        break;
    case Q6_K:
        unpack_k6(&block, row + 210 * (k / 8), k % 8);
        break;
    }
    return block;
}

/* Packs a block of row r at its place in linear_formats.h. */
static void pack_block(int format, uint8_t *out, uint8_t *head, const FileBlock *block, int r)
{
    const uint8_t *q = block->q;
    uint8_t *scales;
    if (format == Q8_0) {
        for (int c = 0; c < 32; c++)
            out[64 * (c / 4) + 4 * r + c % 4] = q[c];
        scales = out + 512;
    } else {
        for (int c = 0; c < 16; c++)
            out[64 * (c / 4) + 4 * r + c % 4] = (uint8_t)((q[c] & 15) | (q[16 + c] & 15) << 4);
        scales = out + 256;
    }
    if (format == Q5_0 || format == Q5_1 || format == Q5_K) {
        for (int c = 0; c < 32; c++)
            scales[4 * r + c % 4] |= (uint8_t)(q[c] >> 4 << c / 4);
        scales += 64;
    }
    if (format == Q6_K) {
        for (int c = 0; c < 32; c++)
            scales[64 * (c / 16) + 4 * r + c % 4] |= (uint8_t)(q[c] >> 4 << 2 * (c % 16 / 4));
        scales += 128;
    }
    if (head_bytes(format)) {
        scales[r] = block->s;
        scales[16 + r] = block->t;
        scales = head;
    }
    memcpy(scales + 2 * r, &block->d, 2);
    if (format != Q4_0 && format != Q5_0 && format != Q8_0)
        memcpy(scales + 32 + 2 * r, &block->m, 2);
}

/* An upper bound of |w| in the block, equal to the largest or slightly more. */
static float max_abs_weight(int format, const FileBlock *block)
{
    static const float largest[NUM_FORMATS] = {
        [Q4_0] = 8, [Q4_1] = 15, [Q5_0] = 16, [Q5_1] = 31, [Q8_0] = 128, [Q4_K] = 15, [Q5_K] = 31,
        [Q6_K] = 32,
    };
    uint16_t halves[LANES] = {block->d, block->m};
    f32v scales = load_f16(halves);
    float d = fabsf(scales[0]) * largest[format], m = fabsf(scales[1]);
    if (format == Q4_K || format == Q5_K)
        return d * block->s + m * block->t;
    if (format == Q6_K)
        return d * fmaxf(fabsf((float)(int8_t)block->s), fabsf((float)(int8_t)block->t));
    return d + m;
}

/* Stores the unit of row r of a group, such that its largest weight uses all the bits that rounded
 * scales allow. */
static void pack_unit(int format, uint8_t *group, const uint8_t *row, int columns, int r)
{
    float largest = 0, unit = 1;
    for (int k = 0; k < columns / BLOCK_COLUMNS; k++) {
        FileBlock block = unpack_file_block(format, row, k);
        float size = max_abs_weight(format, &block);
        if (size > largest || size != size)
            largest = size;
    }
    if (largest != 0)
        unit = largest < INFINITY ? largest / (weight_planes(format) == 2 ? 32750 : 1 << 22) : NAN;
    memcpy(group + 4 * r, &unit, sizeof unit);
}

static void pack_floats(int format, uint8_t *out, const uint8_t *row, int columns, int r)
{
    size_t size = format == F32 ? 4 : 2;
    for (int c = 0; c < columns; c++)
        memcpy(out + size * (size_t)(GROUP_ROWS * c + r), row + size * (size_t)c, size);
}

/* Packs num_rows rows of a file, row_bytes apart, as rows `first` .. of the groups at `groups`,
 * which must be zero.  Consecutive groups of these rows are group_stride groups apart. */
void llmsrv_pack(
    int32_t format,
    int32_t columns,
    const uint8_t *rows,
    int64_t row_bytes,
    int32_t num_rows,
    int32_t first,
    int32_t group_stride,
    uint8_t *groups)
{
    for (int i = first; i < first + num_rows; i++, rows += row_bytes) {
        uint8_t *out = groups
                       + group_bytes(format, columns) * (size_t)(i / GROUP_ROWS * group_stride);
        if (is_float(format)) {
            pack_floats(format, out, rows, columns, i % GROUP_ROWS);
            continue;
        }
        if (UNITS_BYTES)
            pack_unit(format, out, rows, columns, i % GROUP_ROWS);
        out += UNITS_BYTES;
        for (int k = 0; k < columns / BLOCK_COLUMNS; k++) {
            FileBlock block = unpack_file_block(format, rows, k);
            pack_block(format, out + block_offset(format, k), out + head_offset(format, k), &block,
                       i % GROUP_ROWS);
        }
    }
}
