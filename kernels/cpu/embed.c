/* EMBED: out = table[ids] * scale.  The table is as the file has it; the values equal those of
 * quants/ggml_types.py. */
#include "linear_pack.h"
#include "simd.h"

/* Mirrored by backend/cpu/embed.py. */
typedef struct {
    int32_t format, columns;
    const uint8_t *table;
    int64_t row_bytes;
    float *out;
    int64_t out_stride; /* floats from one row to the next */
    float scale;
    const int32_t *ids;     /* -1 - r: the id sampled for row r by the last call, 0 if it failed */
    const int32_t *sampled;
} Embedding;

static float f16_value(uint16_t half)
{
    uint16_t halves[LANES] = {half};
    return load_f16(halves)[0];
}

static void block_values(int format, const FileBlock *block, float *values)
{
    float d = f16_value(block->d), m = f16_value(block->m);
    int offset = format == Q4_0 ? 8 : format == Q5_0 ? 16 : format == Q8_0 ? 128 : 0;
    int has_scales = format == Q4_K || format == Q5_K;
    for (int c = 0; c < BLOCK_COLUMNS; c++) {
        if (format == Q6_K)
            values[c] = d * (int8_t)(c < 16 ? block->s : block->t) * (block->q[c] - 32);
        else if (has_scales)
            values[c] = d * block->s * block->q[c] - m * block->t;
        else
            values[c] = d * (float)(block->q[c] - offset) + m;
    }
}

static f32v float_values(int format, const uint8_t *p)
{
    return format == F32   ? load((const float *)p)
           : format == F16 ? load_f16((const uint16_t *)p)
                           : load_bf16((const uint16_t *)p);
}

/* `columns` need not be a multiple of LANES. */
static void float_row(int format, const uint8_t *row, int columns, float *out)
{
    int size = format == F32 ? 4 : 2;
    for (int c = 0; c < columns; c += LANES) {
        uint8_t bytes[4 * LANES] = {0};
        int n = columns - c < LANES ? columns - c : LANES;
        memcpy(bytes, row + size * c, (size_t)(size * n));
        store_partial(out + c, float_values(format, bytes), n);
    }
}

void llmsrv_embed(const Embedding *e, int32_t num_rows)
{
    for (int32_t r = 0; r < num_rows; r++) {
        int32_t id = e->ids[r] >= 0 ? e->ids[r] : e->sampled[-1 - e->ids[r]];
        const uint8_t *row = e->table + (id > 0 ? id : 0) * e->row_bytes;
        float *out = e->out + r * e->out_stride;
        if (is_float(e->format)) {
            float_row(e->format, row, e->columns, out);
        } else {
            for (int k = 0; k < e->columns / BLOCK_COLUMNS; k++) {
                FileBlock block = unpack_file_block(e->format, row, k);
                block_values(e->format, &block, out + BLOCK_COLUMNS * k);
            }
        }
        for (int32_t c = 0; c < e->columns; c++)
            out[c] *= e->scale;
    }
}
