"""Dequantizes ggml's IQ types.

Most of them store 4 or 8 values at a time as the number of a point in a grid (iq_grids), with signs
of their own and a scale for each group.  The IQ4 types look each value up in a curve.

A block has 256 values; s is a group's small scale, g the grid's value with its sign:
    IQ2_XXS  d, 8 x (4 grid numbers of 8 bits, 4 signs of 7, s of 4)    d * (s + 1/2) / 4 * g
    IQ2_XS   d, 32 x (grid number of 9 bits, signs of 7), 16 s          d * (s + 1/2) / 4 * g
    IQ2_S    d, 32 grid numbers (low 8 bits), 32 signs of 8, 2 high     d * (s + 1/2) / 4 * g
             bits of each number, 16 s
    IQ3_XXS  d, 64 grid numbers of 8 bits, 8 x (4 signs of 7, s of 4)   d * (s + 1/2) / 2 * g
    IQ3_S    d, 64 grid numbers (low 8 bits), 1 high bit of each,       d * (2 s + 1) * g
             32 signs of 8, 8 s
    IQ1_S    d, 32 grid numbers (low 8 bits), 8 x (4 x 3 high bits,     d * (2 s + 1) * (g ± 1/8)
             s of 3, sign of the 1/8)
    IQ1_M    32 grid numbers (low 8 bits), 32 x (3 high bits, sign of   d * (2 s + 1) * (g ± 1/8)
             the 1/8), 4 x (4 s of 3, 4 bits of d)
    IQ4_XS   d, 8 s of 6 bits, 4 bits a value                           d * (s - 32) * curve[q]
    IQ4_NL   32 values: d, 4 bits a value                               d * curve[q]
With 7 bits for signs, the eighth sign makes the number of negative values even.
Source: ggml-common.h (layouts) and dequantize_row_iq* of ggml-quants.c (float32 arithmetic).
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from llmsrv.backend.arrays import Bytes
from llmsrv.backend.arrays import Floats
from llmsrv.backend.quants.iq_grids import IQ1
from llmsrv.backend.quants.iq_grids import IQ2_S
from llmsrv.backend.quants.iq_grids import IQ2_XS
from llmsrv.backend.quants.iq_grids import IQ2_XXS
from llmsrv.backend.quants.iq_grids import IQ3_S
from llmsrv.backend.quants.iq_grids import IQ3_XXS
from llmsrv.backend.quants.iq_grids import IQ4_CURVE
from llmsrv.backend.quants.unpack import bits_of
from llmsrv.backend.quants.unpack import fields
from llmsrv.backend.quants.unpack import half
from llmsrv.backend.quants.unpack import scaled

Numbers = npt.NDArray[np.integer[Any]]

# For each byte of signs, the factors of its eight values: -1 if the bit is set.
SIGNS = 1 - 2 * ((np.arange(256)[:, None] >> np.arange(8)) & 1).astype(np.float32)
# The same for signs of 7 bits.
EVEN_SIGNS = SIGNS[[n | (n.bit_count() & 1) << 7 for n in range(128)]]


def iq2_xxs(blocks: Bytes, out: Floats) -> None:
    groups = np.ascontiguousarray(blocks[:, 2:]).reshape(len(blocks), 8, 8)
    signs, scales = _signs_and_scale(groups[:, :, 4:])
    scales = half(blocks, 0) * scales * np.float32(0.25)
    _signed_grid(IQ2_XXS, groups[:, :, :4], EVEN_SIGNS[signs], scales, out)


def iq2_xs(blocks: Bytes, out: Floats) -> None:
    words = blocks[:, 2:66].view("<u2")
    scales = half(blocks, 0) * (fields(blocks[:, 66:], 4, 1) + np.float32(0.5)) * np.float32(0.25)
    _signed_grid(IQ2_XS, words & 511, EVEN_SIGNS[words >> 9], scales, out)


def iq2_s(blocks: Bytes, out: Floats) -> None:
    numbers = blocks[:, 2:34] | fields(blocks[:, 66:74], 2, 1).astype(np.uint16) << 8
    scales = half(blocks, 0) * (fields(blocks[:, 74:], 4, 1) + np.float32(0.5)) * np.float32(0.25)
    _signed_grid(IQ2_S, numbers, SIGNS[blocks[:, 34:66]], scales, out)


def iq3_xxs(blocks: Bytes, out: Floats) -> None:
    groups = np.ascontiguousarray(blocks[:, 66:]).reshape(len(blocks), 8, 4)
    signs, scales = _signs_and_scale(groups)
    scales = half(blocks, 0) * scales * np.float32(0.5)
    _signed_grid(IQ3_XXS, blocks[:, 2:66], EVEN_SIGNS[signs], scales, out)


def iq3_s(blocks: Bytes, out: Floats) -> None:
    numbers = blocks[:, 2:66] | bits_of(blocks[:, 66:74]).astype(np.uint16) << 8
    scales = half(blocks, 0) * (2 * fields(blocks[:, 106:], 4, 1) + 1)
    _signed_grid(IQ3_S, numbers, SIGNS[blocks[:, 74:106]], scales, out)


def _signs_and_scale(groups: Bytes) -> tuple[Numbers, Floats]:
    """Splits words [N, 8, 4 bytes] into four 7-bit numbers [N, 8, 4] and the upper 4 bits + 1/2."""
    words = groups.view("<u4")  # [N, 8, 1]
    signs = words >> np.arange(0, 28, 7, dtype=np.uint32) & 127
    scales = (words[:, :, 0] >> 28).astype(np.float32)
    scales += 0.5
    return signs, scales


def _signed_grid(
    grid: Floats, numbers: Numbers, signs: Floats, scales: Floats, out: Floats
) -> None:
    """The points of grid [*, 4 or 8], times signs (256 per block), times scales [N, groups]."""
    values = out.reshape(*scales.shape, -1)
    values[...] = grid[numbers].reshape(values.shape)
    values *= signs.reshape(values.shape)
    values *= scales[:, :, None]


def iq1_s(blocks: Bytes, out: Floats) -> None:
    words = blocks[:, 34:].view("<u2")  # [N, 8]
    high = words[:, :, None] >> np.arange(0, 12, 3, dtype=np.uint16) & 7  # [N, 8, 4]
    numbers = blocks[:, 2:34] | high.reshape(len(blocks), 32) << 8
    scales = half(blocks, 0) * (2 * (words >> 12 & 7) + 1)
    _shifted_grid(numbers, words >> 15, scales, out)


def iq1_m(blocks: Bytes, out: Floats) -> None:
    nibbles = fields(blocks[:, 32:48], 4, 1)  # [N, 32]
    numbers = blocks[:, :32] | (nibbles & 7).astype(np.uint16) << 8
    words = blocks[:, 48:].view("<u2")  # [N, 4]
    scales = words[:, :, None] >> np.arange(0, 12, 3, dtype=np.uint16) & 7  # [N, 4, 4]
    quarters = (words >> 12) << np.arange(0, 16, 4, dtype=np.uint16)
    d = np.bitwise_or.reduce(quarters, axis=1, keepdims=True).view(np.float16).astype(np.float32)
    _shifted_grid(numbers, nibbles >> 3, d * (2 * scales.reshape(len(blocks), 16) + 1), out)


def _shifted_grid(numbers: Numbers, negative: Numbers, scales: Floats, out: Floats) -> None:
    """Ternary grid points of numbers [N, 32], plus or minus 1/8, times scales [N, groups]."""
    values = out.reshape(*negative.shape, -1)
    values[...] = IQ1[numbers].reshape(values.shape)
    values += (np.float32(0.125) - np.float32(0.25) * negative)[:, :, None]
    grouped = out.reshape(*scales.shape, -1)
    grouped *= scales[:, :, None]


def iq4_nl(blocks: Bytes, out: Floats) -> None:
    scaled(IQ4_CURVE[fields(blocks[:, 2:], 4, 16)], half(blocks, 0), out)


def iq4_xs(blocks: Bytes, out: Floats) -> None:
    scales = fields(blocks[:, 4:8], 4, 1) | fields(blocks[:, 2:4], 2, 1) << 4
    scales -= 32
    scales_f = half(blocks, 0) * scales.view(np.int8)
    scaled(IQ4_CURVE[fields(blocks[:, 8:], 4, 16)], scales_f, out)
