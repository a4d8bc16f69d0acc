"""ggml's storage types as float32: the values that the bytes of a tensor stand for.

A quantised row is cut into blocks of 32 values, each with a float16 scale d, and for Q4_1 a float16
minimum m.  The low halves of the 16 nibble bytes are values 0 to 15, the high halves 16 to 31.

    Q4_0   d, 16 bytes of nibbles    d * (q - 8)
    Q4_1   d, m, 16 bytes            d * q + m
    Q8_0   d, 32 signed bytes        d * q
Source: ggml-common.h (layouts) and dequantize_row_* of ggml-quants.c (float32 arithmetic).
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

# Blocks turned into float32 at a time: few enough for input and temporaries to stay in the cache.
CHUNK_BLOCKS = 4096


def _f32(blocks: Bytes, out: Floats) -> None:
    out[:] = blocks.view("<f4")


def _f16(blocks: Bytes, out: Floats) -> None:
    out[:] = blocks.view("<f2")


def _bf16(blocks: Bytes, out: Floats) -> None:
    """bfloat16 is the upper half of float32."""
    np.left_shift(blocks.view("<u2"), np.uint32(16), out=out.view(np.uint32), dtype=np.uint32)


def _q4_0(blocks: Bytes, out: Floats) -> None:
    d = blocks[:, :2].view("<f2").astype(np.float32)
    _nibbles(blocks[:, 2:], out)
    out -= np.float32(8)
    out *= d


def _q4_1(blocks: Bytes, out: Floats) -> None:
    d = blocks[:, :2].view("<f2").astype(np.float32)
    m = blocks[:, 2:4].view("<f2").astype(np.float32)
    _nibbles(blocks[:, 4:], out)
    out *= d
    out += m


def _q8_0(blocks: Bytes, out: Floats) -> None:
    d = blocks[:, :2].view("<f2").astype(np.float32)
    np.multiply(blocks[:, 2:].view(np.int8), d, out=out)


def _nibbles(packed: Bytes, out: Floats) -> None:
    out[:, :16] = packed & 15
    out[:, 16:] = packed >> 4


# type -> values in a block, bytes in a block, blocks [N, bytes] to values [N, values]
TYPES: dict[str, tuple[int, int, Callable[[Bytes, Floats], None]]] = {
    "F32": (1, 4, _f32),
    "F16": (1, 2, _f16),
    "BF16": (1, 2, _bf16),
    "Q4_0": (32, 18, _q4_0),
    "Q4_1": (32, 20, _q4_1),
    "Q8_0": (32, 34, _q8_0),
}


def dequantise(type: str, data: Bytes, out: Floats) -> None:
    """Writes the values of a tensor of one of TYPES into out.

    data  [size] uint8, the tensor's bytes
    out   any shape of as many values, C-contiguous
    """
    block_values, block_bytes, convert = TYPES[type]
    blocks = data.reshape(-1, block_bytes)
    values = out.reshape(-1, block_values)
    for start in range(0, len(blocks), CHUNK_BLOCKS):
        chunk = slice(start, start + CHUNK_BLOCKS)
        convert(blocks[chunk], values[chunk])
