"""Dequantizes ggml's types that store plain floats or have one scale in each block.

A block has 32 values, except that Q1_0 has 128 and NVFP4 has 4 x 16 with a scale for each 16.
k_quants.py and iq_quants.py have the other types.  The fields of a block, in the order of its
bytes, and the value of one element; q is made of the low bits ql and the high bit qh:
    Q1_0   d, q 1 bit                  d * (2 q - 1)
    Q4_0   d, q 4 bits                 d * (q - 8)
    Q4_1   d, m, q 4 bits              d * q + m
    Q5_0   d, qh, ql 4 bits            d * (q - 16)
    Q5_1   d, m, qh, ql 4 bits         d * q + m
    Q8_0   d, q int8                   d * q
    MXFP4  exponent, q 4 bits          2^(exponent - 127) * e2m1(q)
    NVFP4  4 scales, q 4 bits          e4m3(scale) * e2m1(q)
d and m are float16.  16 bytes of 4-bit q hold 32 values: the low halves are the first 16.

Every function takes blocks [N, bytes of a block] and writes out [N, values of a block].
Source: ggml-common.h (layouts) and dequantize_row_* of ggml-quants.c (float32 arithmetic).
"""

import numpy as np

from llmsrv.backend.arrays import Bytes
from llmsrv.backend.arrays import Floats
from llmsrv.backend.quants.unpack import bits_of
from llmsrv.backend.quants.unpack import fields
from llmsrv.backend.quants.unpack import half
from llmsrv.backend.quants.unpack import scaled

# Twice the 16 values of e2m1 (sign, 2 bits of exponent, 1 of mantissa): doubled, they are integers.
E2M1_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)


def f32(blocks: Bytes, out: Floats) -> None:
    out[:] = blocks.view("<f4")


def f16(blocks: Bytes, out: Floats) -> None:
    out[:] = blocks.view("<f2")


def bf16(blocks: Bytes, out: Floats) -> None:
    """bfloat16 is the upper half of a float32."""
    np.left_shift(blocks.view("<u2"), np.uint32(16), out=out.view(np.uint32), dtype=np.uint32)


def q1_0(blocks: Bytes, out: Floats) -> None:
    q = bits_of(blocks[:, 2:]) << 1
    q -= 1
    scaled(q.view(np.int8), half(blocks, 0), out)


def q4_0(blocks: Bytes, out: Floats) -> None:
    q = fields(blocks[:, 2:], 4, 16)
    q -= 8
    scaled(q.view(np.int8), half(blocks, 0), out)


def q4_1(blocks: Bytes, out: Floats) -> None:
    scaled(fields(blocks[:, 4:], 4, 16), half(blocks, 0), out)
    out += half(blocks, 2)


def q5_0(blocks: Bytes, out: Floats) -> None:
    q = fields(blocks[:, 6:], 4, 16)
    q |= bits_of(blocks[:, 2:6]) << 4
    q -= 16
    scaled(q.view(np.int8), half(blocks, 0), out)


def q5_1(blocks: Bytes, out: Floats) -> None:
    q = fields(blocks[:, 8:], 4, 16)
    q |= bits_of(blocks[:, 4:8]) << 4
    scaled(q, half(blocks, 0), out)
    out += half(blocks, 2)


def q8_0(blocks: Bytes, out: Floats) -> None:
    scaled(blocks[:, 2:].view(np.int8), half(blocks, 0), out)


def mxfp4(blocks: Bytes, out: Floats) -> None:
    """Half of 2^(e - 127) is the float32 whose exponent field is e - 1; the two smallest e give
    subnormals."""
    e = blocks[:, :1].astype(np.uint32)
    halves = np.where(e < 2, np.uint32(1 << 21) << e, (e - 1) << 23).astype(np.uint32)
    q = fields(blocks[:, 1:], 4, 16)
    scaled(E2M1_DOUBLED[q], halves.view(np.float32), out)


def nvfp4(blocks: Bytes, out: Floats) -> None:
    """A scale has no sign, 4 bits of exponent, 3 of mantissa; 0x7f, which is NaN, counts as 0."""
    e, mantissa = blocks[:, :4] >> 3 & 15, (blocks[:, :4] & 7).astype(np.float32)
    normal = np.ldexp(8 + mantissa, e.astype(np.int32) - 11)
    halves = np.where(e == 0, np.ldexp(mantissa, -10), normal)
    halves[blocks[:, :4] == 0x7F] = 0
    scaled(E2M1_DOUBLED[fields(blocks[:, 4:], 4, 8)], halves, out)
