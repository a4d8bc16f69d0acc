/* What becomes of the sums of a product: value = (sum + bias) * scale, then
 *     gated     0: none; 1: out = silu(gate) * up; 2: out = gelu(gate) * up by tanh, as an operand
 *     softcap   c tanh(value / c), if c is not 0
 *     accumulate  out += value
 *
 *   out   [num_rows, out_stride] float32; T16 if gated
 *   bias  [width] float32, or null; if gated, gate's then up's: [2 * width]
 * If gated, a tile of weights has 8 rows of gate, then the same 8 rows of up. */

struct Epilogue {
    void *out;
    long long out_stride;
    int width;
    const float *bias;
    float scale, softcap;
    int gated, accumulate;
};

__device__ __forceinline__ void store(const Epilogue &e, int row, int column, float sum)
{
    float value = (sum + (e.bias ? e.bias[column] : 0.0f)) * e.scale;
    if (e.softcap != 0.0f)
        value = e.softcap * tanhf(value / e.softcap);
    float *out = (float *)e.out + row * e.out_stride + column;
    *out = e.accumulate ? *out + value : value;
}

__device__ __forceinline__ void store_gated(
    const Epilogue &e, int row, int column, float gate_sum, float up_sum)
{
    float gate = (gate_sum + (e.bias ? e.bias[column] : 0.0f)) * e.scale;
    float up = (up_sum + (e.bias ? e.bias[e.width + column] : 0.0f)) * e.scale;
    float activated;
    if (e.gated == 1) {
        activated = gate / (1.0f + expf(-gate));
    } else {
        float inner = 0.7978845608f * (gate + 0.044715f * gate * gate * gate);
        activated = 0.5f * gate * (1.0f + tanhf(inner));
    }
    ((T16 *)e.out)[row * e.out_stride + column] = to_T16(activated * up);
}
