"""ggml's types for stored tensors: the size of their blocks, and how they become float32."""

from collections.abc import Callable
from typing import NamedTuple

from llmsrv.backend.arrays import Bytes
from llmsrv.backend.arrays import Floats
from llmsrv.backend.quants import block_quants
from llmsrv.backend.quants import iq_quants
from llmsrv.backend.quants import k_quants

# Values dequantized at a time: few enough for input and temporaries to stay in the cache.
CHUNK_VALUES = 1 << 17


class GGMLType(NamedTuple):
    """block_values, block_bytes  the size of a block; dequantize_blocks  writes the values of
    blocks [N, block_bytes] to an array [N, block_values]"""

    block_values: int
    block_bytes: int
    dequantize_blocks: Callable[[Bytes, Floats], None]


# By the name that ggml has for the type.
GGML_TYPES = {
    "F32": GGMLType(1, 4, block_quants.f32),
    "F16": GGMLType(1, 2, block_quants.f16),
    "BF16": GGMLType(1, 2, block_quants.bf16),
    "Q1_0": GGMLType(128, 18, block_quants.q1_0),
    "Q4_0": GGMLType(32, 18, block_quants.q4_0),
    "Q4_1": GGMLType(32, 20, block_quants.q4_1),
    "Q5_0": GGMLType(32, 22, block_quants.q5_0),
    "Q5_1": GGMLType(32, 24, block_quants.q5_1),
    "Q8_0": GGMLType(32, 34, block_quants.q8_0),
    "Q2_K": GGMLType(256, 84, k_quants.q2_k),
    "Q3_K": GGMLType(256, 110, k_quants.q3_k),
    "Q4_K": GGMLType(256, 144, k_quants.q4_k),
    "Q5_K": GGMLType(256, 176, k_quants.q5_k),
    "Q6_K": GGMLType(256, 210, k_quants.q6_k),
    "TQ1_0": GGMLType(256, 54, k_quants.tq1_0),
    "TQ2_0": GGMLType(256, 66, k_quants.tq2_0),
    "IQ1_S": GGMLType(256, 50, iq_quants.iq1_s),
    "IQ1_M": GGMLType(256, 56, iq_quants.iq1_m),
    "IQ2_XXS": GGMLType(256, 66, iq_quants.iq2_xxs),
    "IQ2_XS": GGMLType(256, 74, iq_quants.iq2_xs),
    "IQ2_S": GGMLType(256, 82, iq_quants.iq2_s),
    "IQ3_XXS": GGMLType(256, 98, iq_quants.iq3_xxs),
    "IQ3_S": GGMLType(256, 110, iq_quants.iq3_s),
    "IQ4_NL": GGMLType(32, 18, iq_quants.iq4_nl),
    "IQ4_XS": GGMLType(256, 136, iq_quants.iq4_xs),
    "MXFP4": GGMLType(32, 17, block_quants.mxfp4),
    "NVFP4": GGMLType(64, 36, block_quants.nvfp4),
}


def dequantize(type: str, data: Bytes, out: Floats) -> None:
    """Writes the values of a tensor to `out`.

    type  one of GGML_TYPES
    data  [size] uint8, the tensor's bytes
    out   C-contiguous, of any shape with as many values as the tensor
    """
    block_values, block_bytes, dequantize_blocks = GGML_TYPES[type]
    blocks = data.reshape(-1, block_bytes)
    values = out.reshape(-1, block_values)
    step = CHUNK_VALUES // block_values
    for start in range(0, len(blocks), step):
        dequantize_blocks(blocks[start : start + step], values[start : start + step])
