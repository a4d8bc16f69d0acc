"""Weights with random values, of any type, to check and measure backends with."""

from math import prod

import numpy as np

from llmsrv.backend.arrays import Array
from llmsrv.backend.program import Tensor
from llmsrv.backend.quants.ggml_types import GGML_TYPES

# The offsets of the float16 scales in a block of each type.
HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}


def random_tensor(
    name: str, type: str, shape: tuple[int, ...], seed: int = 0, size: float = 1.0
) -> Tensor:
    """Values of magnitude `size`; quantized blocks are random bytes with scales that fit it."""
    rng = np.random.default_rng(seed)
    count = prod(shape)
    if type not in HALVES:
        return Tensor(name, type, shape, float_bytes(type, rng.normal(size=count) * size))
    block = GGML_TYPES[type]
    num_blocks = count // block.block_values
    blocks = rng.integers(0, 256, (num_blocks, block.block_bytes), np.uint8)
    for offset in HALVES[type]:
        scales = (size * rng.uniform(-0.02, 0.02, num_blocks)).astype(np.float16)
        blocks[:, offset : offset + 2] = scales[:, None].view(np.uint8)
    return Tensor(name, type, shape, blocks.reshape(-1))


def float_bytes(type: str, values: Array) -> Array:
    """The bytes of a tensor of type F32, F16 or BF16 (rounded towards zero)."""
    if type == "BF16":
        upper = np.asarray(values, np.float32).view(np.uint32) >> 16
        return upper.astype(np.uint16).reshape(-1).view(np.uint8)
    floats = np.asarray(values, {"F32": np.float32, "F16": np.float16}[type])
    return floats.reshape(-1).view(np.uint8)
