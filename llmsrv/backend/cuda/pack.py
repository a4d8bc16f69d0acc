"""Arranges rows of a weight as kernels/cuda/formats.cuh describes, in numpy.

A format turns rows of a file, [N, bytes of a row], into one array [N, tiles of columns, bytes] for
each of its planes.  Tiles of rows are made of these afterwards (weights.py).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llmsrv.backend.arrays import Array
from llmsrv.backend.arrays import Bytes
from llmsrv.backend.program import Tensor
from llmsrv.backend.quants.ggml_types import GGML_TYPES
from llmsrv.backend.quants.ggml_types import dequantize
from llmsrv.backend.quants.unpack import bits_of
from llmsrv.backend.quants.unpack import fields

TILE_ROWS = 16
BLOCK_COLUMNS = 32
SUPER_COLUMNS = 256  # of a block of the K types
PLANES = ("values", "high", "scales", "super_scales")
PIECES = 4  # of 16 bytes in a row of a tile
T16_MAX = np.float32(65504)

Planes = dict[str, Bytes]  # plane -> bytes, in a shape that its function documents


@dataclass(frozen=True)
class Format:
    """How the rows of a type are stored.

    blocks       blocks of 32 columns in a tile
    plane_bytes  of a row in a tile; for super_scales, of a row and 256 columns
    row_planes   a file's rows, [N, bytes of a row] -> the planes
    """

    blocks: int
    plane_bytes: dict[str, int]
    row_planes: Callable[[Bytes], Planes]

    def column_tiles(self, columns: int) -> int:
        return -(-columns // (self.blocks * BLOCK_COLUMNS))

    def row_tile_bytes(self, columns: int) -> dict[str, int]:
        """The bytes of a tile of rows, in each plane."""
        num_tiles = {name: self.column_tiles(columns) for name in self.plane_bytes}
        if "super_scales" in num_tiles:
            num_tiles["super_scales"] = columns // SUPER_COLUMNS
        return {
            name: TILE_ROWS * num_tiles[name] * size for name, size in self.plane_bytes.items()
        }


def format_of(tensor: Tensor) -> str:
    """The format that the tensor is packed to: that of its type, or T16."""
    return tensor.type if tensor.type in FORMATS else "T16"


def planes_of_rows(tensor: Tensor, start: int, end: int, format: str, dtype: str) -> Planes:
    """Rows [start, end) of a tensor: plane -> [rows, tiles of columns, bytes].

    format  the tensor's, or T16
    dtype   float16 or bfloat16, the type of T16
    """
    num_rows, columns = tensor.shape
    rows = tensor.data.reshape(num_rows, -1)[start:end]
    if format == "T16":
        return {"values": _t16(rows, tensor.type, columns, dtype)}
    return FORMATS[format].row_planes(rows)


# ---- T16


def _t16(rows: Bytes, type: str, columns: int, dtype: str) -> Bytes:
    """[rows, tiles of columns, 64]"""
    padded = -(-columns // BLOCK_COLUMNS) * BLOCK_COLUMNS
    words = np.zeros((len(rows), padded), np.uint16)
    if (type, dtype) in (("F16", "float16"), ("BF16", "bfloat16")):
        words[:, :columns] = rows.view(np.uint16)
    else:
        values = np.empty((len(rows), columns), np.float32)
        dequantize(type, rows.reshape(-1), values)
        words[:, :columns] = _rounded(values, dtype)
    return words.view(np.uint8).reshape(len(rows), -1, 2 * BLOCK_COLUMNS)


def _rounded(values: Array, dtype: str) -> Array:
    """The bits of T16, rounded to nearest even; float16 saturates."""
    if dtype == "float16":
        return np.clip(values, -T16_MAX, T16_MAX).astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


# ---- Quantized types


def _blocks(rows: Bytes, type: str) -> Bytes:
    """[rows, blocks, bytes of a block]"""
    return rows.reshape(len(rows), -1, GGML_TYPES[type].block_bytes)


def _in_tiles(array: Array, blocks: int) -> Array:
    """[rows, blocks of 32 columns, ...] -> [rows, tiles of columns, blocks, ...], padded with 0."""
    num_rows, num_blocks = array.shape[:2]
    if padding := -num_blocks % blocks:
        widths = [(0, 0)] * array.ndim
        widths[1] = (0, padding)
        array = np.pad(array, widths)
    return array.reshape(num_rows, (num_blocks + padding) // blocks, blocks, *array.shape[2:])


def _bytes(tiles: Array) -> Bytes:
    """[rows, tiles of columns, ...] -> [rows, tiles of columns, bytes]"""
    tiles = np.ascontiguousarray(tiles)
    return tiles.view(np.uint8).reshape(*tiles.shape[:2], -1)


def _words(q: Bytes, first_bit: int, bits: int) -> Array:
    """Some bits of each of q [rows, blocks, 32], as one word a piece: [rows, tiles, 4, 4] uint32.

    The columns of a piece are c0 .. c7.  The low half of the word has the bits of c0 c2 c4 c6, side
    by side from the lowest bit on, the high half those of c1 c3 c5 c7."""
    eight = np.ascontiguousarray(q).view(np.uint64)  # c0 is the lowest byte
    mask = np.uint64(((1 << bits) - 1) * 0x0001_0001_0001_0001)

    def side_by_side(first: int) -> Array:
        """c0 c2 c4 c6, 16 bits apart, become two pairs, 32 bits apart, and then neighbours."""
        fields = eight >> np.uint64(first_bit + 8 * first) & mask
        fields |= fields >> np.uint64(16 - bits)
        fields |= fields >> np.uint64(2 * (16 - bits))
        return fields & np.uint64((1 << 4 * bits) - 1)

    words = side_by_side(0) | side_by_side(1) << np.uint64(16)
    return _in_tiles(words.astype(np.uint32), 4)


def _low_bits(q: Bytes) -> Bytes:
    """Bits 0 to 3, for a tile's values: a word a block in each piece."""
    return _bytes(_words(q, 0, 4).swapaxes(2, 3))


def _fifth_bits(q: Bytes) -> Bytes:
    """Bit 4, of 4 blocks in one word a piece."""
    words = _words(q, 4, 1)
    shifts = np.arange(0, 16, 4, dtype=np.uint32)[:, None]
    return _bytes(np.bitwise_or.reduce(words << shifts, axis=2))


def _high_pairs(q: Bytes) -> Bytes:
    """Bits 4 and 5, of 2 blocks in each of two words a piece."""
    words = _words(q, 4, 2)
    pairs = words[:, :, 0::2] | words[:, :, 1::2] << np.uint32(8)  # [rows, tiles, 2, 4]
    return _bytes(pairs.swapaxes(2, 3))


def _q8_0(rows: Bytes) -> Planes:
    blocks = _blocks(rows, "Q8_0")
    eight = np.ascontiguousarray(blocks[..., 2:]).view(np.uint64)  # [rows, blocks, 4]
    values = _in_tiles(eight, 2).swapaxes(2, 3)
    return {"values": _bytes(values), "scales": _bytes(_in_tiles(blocks[..., :2], 2))}


def _q4(type: str, scale_bytes: int) -> Callable[[Bytes], Planes]:
    """Q4_0 and Q4_1."""

    def row_planes(rows: Bytes) -> Planes:
        blocks = _blocks(rows, type)
        q = _nibbles(blocks[..., scale_bytes:])
        return {"values": _low_bits(q), "scales": _bytes(_in_tiles(blocks[..., :scale_bytes], 4))}

    return row_planes


def _q5(type: str, scale_bytes: int) -> Callable[[Bytes], Planes]:
    """Q5_0 and Q5_1."""

    def row_planes(rows: Bytes) -> Planes:
        blocks = _blocks(rows, type)
        high = blocks[..., scale_bytes : scale_bytes + 4].reshape(-1, 4)
        q = _nibbles(blocks[..., scale_bytes + 4 :])
        q |= bits_of(high).reshape(q.shape) << 4
        return {
            "values": _low_bits(q),
            "high": _fifth_bits(q),
            "scales": _bytes(_in_tiles(blocks[..., :scale_bytes], 4)),
        }

    return row_planes


def _nibbles(packed: Bytes) -> Bytes:
    """[rows, blocks, 16] -> [rows, blocks, 32], as in fields()."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _q4_k(rows: Bytes) -> Planes:
    blocks = _blocks(rows, "Q4_K")
    q = fields(blocks[..., 16:].reshape(-1, 128), 4, 32).reshape(len(rows), -1, 32)
    return {"values": _low_bits(q), **_k_scales(blocks)}


def _q5_k(rows: Bytes) -> Planes:
    blocks = _blocks(rows, "Q5_K")
    q = fields(blocks[..., 48:].reshape(-1, 128), 4, 32)
    q |= fields(blocks[..., 16:48].reshape(-1, 32), 1, 32) << 4
    q = q.reshape(len(rows), -1, 32)
    return {"values": _low_bits(q), "high": _fifth_bits(q), **_k_scales(blocks)}


def _k_scales(blocks: Bytes) -> Planes:
    """Scales and minima of Q4_K and Q5_K, unpacked from 6 bits: see k_quants.py."""
    low, high = blocks[..., 4:12], blocks[..., 4:12] >> 6 << 4
    last = blocks[..., 12:16]
    scales = np.concatenate([low[..., :4] & 63, last & 15 | high[..., :4]], axis=-1)
    minima = np.concatenate([low[..., 4:] & 63, last >> 4 | high[..., 4:]], axis=-1)
    pairs = np.stack([scales, minima], axis=-1).reshape(len(blocks), -1, 2)
    return {"scales": _bytes(_in_tiles(pairs, 4)), "super_scales": _bytes(blocks[..., :4])}


def _q6_k(rows: Bytes) -> Planes:
    blocks = _blocks(rows, "Q6_K")
    q = fields(blocks[..., :128].reshape(-1, 128), 4, 64)
    q |= fields(blocks[..., 128:192].reshape(-1, 64), 2, 32) << 4
    # A piece has 4 columns of each half of a block.
    halves = q.view(np.uint32).reshape(len(rows), -1, 2, PIECES).swapaxes(2, 3)
    q = np.ascontiguousarray(halves).view(np.uint8).reshape(len(rows), -1, 32)
    return {
        "values": _low_bits(q),
        "high": _high_pairs(q),
        "scales": _bytes(_in_tiles(blocks[..., 192:208].reshape(len(rows), -1, 2), 4)),
        "super_scales": _bytes(blocks[..., 208:]),
    }


FORMATS = {
    "T16": Format(1, {"values": 64}, lambda rows: {}),
    "Q8_0": Format(2, {"values": 64, "scales": 4}, _q8_0),
    "Q4_0": Format(4, {"values": 64, "scales": 8}, _q4("Q4_0", 2)),
    "Q4_1": Format(4, {"values": 64, "scales": 16}, _q4("Q4_1", 4)),
    "Q5_0": Format(4, {"values": 64, "high": 16, "scales": 8}, _q5("Q5_0", 2)),
    "Q5_1": Format(4, {"values": 64, "high": 16, "scales": 16}, _q5("Q5_1", 4)),
    "Q4_K": Format(4, {"values": 64, "scales": 8, "super_scales": 4}, _q4_k),
    "Q5_K": Format(4, {"values": 64, "high": 16, "scales": 8, "super_scales": 4}, _q5_k),
    "Q6_K": Format(4, {"values": 64, "high": 32, "scales": 8, "super_scales": 2}, _q6_k),
}
