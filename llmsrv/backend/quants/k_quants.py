"""Dequantizes ggml's K types, with two levels of scales, and its ternary types.

A K block has 256 values in groups of 16 or 32.  Each group has a small integer scale, and in some
types a minimum; the block has a float16 scale for these.  The fields of a block, in the order of
its bytes, and the value of one element; q is made of the low bits ql and the high bits qh:
    Q2_K   16 x (scale 4 bits, minimum 4 bits), q 2 bits, d, m       d * scale * q - m * minimum
    Q3_K   qh 1 bit, ql 2 bits, 16 scales of 6 bits, d               d * (scale - 32) * (q - 4)
    Q4_K   d, m, 8 x (scale 6 bits, minimum 6 bits), q 4 bits        as Q2_K
    Q5_K   d, m, 8 x (scale 6 bits, minimum 6 bits), qh 1 bit, ql    as Q2_K
    Q6_K   ql 4 bits, qh 2 bits, 16 scales int8, d                   d * scale * (q - 32)
    TQ1_0  5 values in a byte, as digits in base 3, d                d * (q - 1)
    TQ2_0  q 2 bits, d                                               d * (q - 1)
Source: ggml-common.h (layouts) and dequantize_row_* of ggml-quants.c (float32 arithmetic).
"""

import numpy as np

from llmsrv.backend.arrays import Bytes
from llmsrv.backend.arrays import Floats
from llmsrv.backend.quants.unpack import fields
from llmsrv.backend.quants.unpack import half
from llmsrv.backend.quants.unpack import scaled


def q2_k(blocks: Bytes, out: Floats) -> None:
    scales, minima = blocks[:, :16] & 15, blocks[:, :16] >> 4
    values = scaled(fields(blocks[:, 16:80], 2, 32), half(blocks, 80) * scales, out)
    values -= (half(blocks, 82) * minima)[:, :, None]


def q3_k(blocks: Bytes, out: Floats) -> None:
    q = fields(blocks[:, 32:96], 2, 32)
    q |= fields(blocks[:, :32], 1, 32) << 2
    scales = fields(blocks[:, 96:104], 4, 8) | fields(blocks[:, 104:108], 2, 4) << 4
    q -= 4
    scales -= 32
    scaled(q.view(np.int8), half(blocks, 108) * scales.view(np.int8), out)


def q4_k(blocks: Bytes, out: Floats) -> None:
    _with_minima(blocks, fields(blocks[:, 16:], 4, 32), out)


def q5_k(blocks: Bytes, out: Floats) -> None:
    q = fields(blocks[:, 48:], 4, 32)
    q |= fields(blocks[:, 16:48], 1, 32) << 4
    _with_minima(blocks, q, out)


def _with_minima(blocks: Bytes, q: Bytes, out: Floats) -> None:
    """The first four scales and minima are in the low 6 bits of 8 bytes.  The other four have their
    low 4 bits in the last 4 bytes, and their high 2 bits above the first four."""
    low, high = blocks[:, 4:12], blocks[:, 4:12] >> 6 << 4
    last = blocks[:, 12:16]
    scales = np.concatenate([low[:, :4] & 63, last & 15 | high[:, :4]], axis=1)
    minima = np.concatenate([low[:, 4:] & 63, last >> 4 | high[:, 4:]], axis=1)
    values = scaled(q, half(blocks, 0) * scales, out)
    values -= (half(blocks, 2) * minima)[:, :, None]


def q6_k(blocks: Bytes, out: Floats) -> None:
    q = fields(blocks[:, :128], 4, 64)
    q |= fields(blocks[:, 128:192], 2, 32) << 4
    q -= 32
    scaled(q.view(np.int8), half(blocks, 208) * blocks[:, 192:208].view(np.int8), out)


def tq1_0(blocks: Bytes, out: Floats) -> None:
    """A byte is a fraction in 256ths; times 3, its integer part is the next digit."""
    start = 0
    for first, last, digits in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
        powers = np.uint8(3) ** np.arange(digits, dtype=np.uint8)[:, None]
        fractions = blocks[:, None, first:last] * powers  # [N, digits, bytes], modulo 256
        end = start + digits * (last - first)
        out[:, start:end] = (fractions.astype(np.uint16) * 3 >> 8).reshape(len(blocks), -1)
        start = end
    out -= 1
    out *= half(blocks, 52)


def tq2_0(blocks: Bytes, out: Floats) -> None:
    q = fields(blocks[:, :64], 2, 32)
    q -= 1
    scaled(q.view(np.int8), half(blocks, 64), out)
