"""ggml's storage types as float32: the values that the bytes of a tensor stand for.

Here are the types that store numbers as they are, and those whose blocks of 32 values (Q1_0: 128,
NVFP4: 4 x 16) have one scale each; k_quants and iq_quants have the others.  In the order of the
bytes, q made of the low bits ql and the high bit qh:
    Q1_0   d, q 1 bit                  d * (2 q - 1)
    Q4_0   d, q 4 bits                 d * (q - 8)
    Q4_1   d, m, q 4 bits              d * q + m
    Q5_0   d, qh, ql 4 bits            d * (q - 16)
    Q5_1   d, m, qh, ql 4 bits         d * q + m
    Q8_0   d, q int8                   d * q
    MXFP4  exponent, q 4 bits          2^(exponent - 127) * e2m1(q)
    NVFP4  4 scales, q 4 bits          e4m3(scale) * e2m1(q)
d and m are float16.  Of 16 bytes with two q each the low halves are the first 16 values.
Source: ggml-common.h (layouts) and dequantize_row_* of ggml-quants.c (float32 arithmetic).
"""

from collections.abc import Callable

import numpy as np

from llmsrv.backend.quants import iq_quants
from llmsrv.backend.quants import k_quants
from llmsrv.backend.quants.packed import Bytes
from llmsrv.backend.quants.packed import Floats
from llmsrv.backend.quants.packed import bits_of
from llmsrv.backend.quants.packed import fields
from llmsrv.backend.quants.packed import half
from llmsrv.backend.quants.packed import scaled

# Values written at a time: few enough for input and temporaries to stay in the cache.
CHUNK_VALUES = 1 << 17

# Twice the 16 values of e2m1 (sign, 2 bits of exponent, 1 of mantissa), which are then integers.
E2M1_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)


def _f32(blocks: Bytes, out: Floats) -> None:
    out[:] = blocks.view("<f4")


def _f16(blocks: Bytes, out: Floats) -> None:
    out[:] = blocks.view("<f2")


def _bf16(blocks: Bytes, out: Floats) -> None:
    """bfloat16 is the upper half of float32."""
    np.left_shift(blocks.view("<u2"), np.uint32(16), out=out.view(np.uint32), dtype=np.uint32)


def _q1_0(blocks: Bytes, out: Floats) -> None:
    q = bits_of(blocks[:, 2:]) << 1
    q -= 1
    scaled(q.view(np.int8), half(blocks, 0), out)


def _q4_0(blocks: Bytes, out: Floats) -> None:
    q = fields(blocks[:, 2:], 4, 16)
    q -= 8
    scaled(q.view(np.int8), half(blocks, 0), out)


def _q4_1(blocks: Bytes, out: Floats) -> None:
    scaled(fields(blocks[:, 4:], 4, 16), half(blocks, 0), out)
    out += half(blocks, 2)


def _q5_0(blocks: Bytes, out: Floats) -> None:
    q = fields(blocks[:, 6:], 4, 16)
    q |= bits_of(blocks[:, 2:6]) << 4
    q -= 16
    scaled(q.view(np.int8), half(blocks, 0), out)


def _q5_1(blocks: Bytes, out: Floats) -> None:
    q = fields(blocks[:, 8:], 4, 16)
    q |= bits_of(blocks[:, 4:8]) << 4
    scaled(q, half(blocks, 0), out)
    out += half(blocks, 2)


def _q8_0(blocks: Bytes, out: Floats) -> None:
    scaled(blocks[:, 2:].view(np.int8), half(blocks, 0), out)


def _mxfp4(blocks: Bytes, out: Floats) -> None:
    """Half of 2^(e - 127) is what float32's exponent field gives for e - 1; the two smallest e
    give subnormals."""
    e = blocks[:, :1].astype(np.uint32)
    halves = np.where(e < 2, np.uint32(1 << 21) << e, (e - 1) << 23).astype(np.uint32)
    q = fields(blocks[:, 1:], 4, 16)
    scaled(E2M1_DOUBLED[q], halves.view(np.float32), out)


def _nvfp4(blocks: Bytes, out: Floats) -> None:
    """Scales without sign: 4 bits of exponent, 3 of mantissa, and 0x7f, not a number, as 0."""
    e, mantissa = blocks[:, :4] >> 3 & 15, (blocks[:, :4] & 7).astype(np.float32)
    normal = np.ldexp(8 + mantissa, e.astype(np.int32) - 11)
    halves = np.where(e == 0, np.ldexp(mantissa, -10), normal)
    halves[blocks[:, :4] == 0x7F] = 0
    scaled(E2M1_DOUBLED[fields(blocks[:, 4:], 4, 8)], halves, out)


# type -> values in a block, bytes in a block, blocks [N, bytes] to values [N, values]
TYPES: dict[str, tuple[int, int, Callable[[Bytes, Floats], None]]] = {
    "F32": (1, 4, _f32),
    "F16": (1, 2, _f16),
    "BF16": (1, 2, _bf16),
    "Q1_0": (128, 18, _q1_0),
    "Q4_0": (32, 18, _q4_0),
    "Q4_1": (32, 20, _q4_1),
    "Q5_0": (32, 22, _q5_0),
    "Q5_1": (32, 24, _q5_1),
    "Q8_0": (32, 34, _q8_0),
    "Q2_K": (256, 84, k_quants.q2_k),
    "Q3_K": (256, 110, k_quants.q3_k),
    "Q4_K": (256, 144, k_quants.q4_k),
    "Q5_K": (256, 176, k_quants.q5_k),
    "Q6_K": (256, 210, k_quants.q6_k),
    "TQ1_0": (256, 54, k_quants.tq1_0),
    "TQ2_0": (256, 66, k_quants.tq2_0),
    "IQ1_S": (256, 50, iq_quants.iq1_s),
    "IQ1_M": (256, 56, iq_quants.iq1_m),
    "IQ2_XXS": (256, 66, iq_quants.iq2_xxs),
    "IQ2_XS": (256, 74, iq_quants.iq2_xs),
    "IQ2_S": (256, 82, iq_quants.iq2_s),
    "IQ3_XXS": (256, 98, iq_quants.iq3_xxs),
    "IQ3_S": (256, 110, iq_quants.iq3_s),
    "IQ4_NL": (32, 18, iq_quants.iq4_nl),
    "IQ4_XS": (256, 136, iq_quants.iq4_xs),
    "MXFP4": (32, 17, _mxfp4),
    "NVFP4": (64, 36, _nvfp4),
}


def dequantise(type: str, data: Bytes, out: Floats) -> None:
    """Writes the values of a tensor of one of TYPES into out.

    data  [size] uint8, the tensor's bytes
    out   any shape of as many values, C-contiguous
    """
    block_values, block_bytes, convert = TYPES[type]
    blocks = data.reshape(-1, block_bytes)
    values = out.reshape(-1, block_values)
    step = CHUNK_VALUES // block_values
    for start in range(0, len(blocks), step):
        convert(blocks[start:start + step], values[start:start + step])
