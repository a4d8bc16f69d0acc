"""Unpacks the bit fields of quantized blocks; block_quants, k_quants and iq_quants share it."""

import numpy as np
import numpy.typing as npt

from llmsrv.backend.arrays import Bytes
from llmsrv.backend.arrays import Floats


def half(blocks: Bytes, at: int) -> Floats:
    """The float16 that starts at byte `at` of each block, as float32: [N, 1]."""
    return blocks[:, at:at + 2].view("<f2").astype(np.float32)


def fields(packed: Bytes, bits: int, run: int) -> Bytes:
    """Unpacks fields of `bits` bits from bytes [N, size] into [N, size * 8 // bits].

    The bytes are divided into runs of `run` bytes.  A run gives the lowest `bits` bits of all its
    bytes, then the next higher bits of all its bytes, and so on: with 4 bits, a run of 32 bytes
    gives 64 values, the low halves first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    runs = packed.reshape(len(packed), packed.shape[1] // run, 1, run)
    values = runs >> shifts
    values &= np.uint8((1 << bits) - 1)
    return values.reshape(len(packed), -1)


def bits_of(packed: Bytes) -> Bytes:
    """Unpacks bytes [N, size] into single bits [N, 8 * size], the lowest bit of each byte first."""
    return np.unpackbits(packed, axis=1, bitorder="little")


def scaled(values: Bytes | npt.NDArray[np.int8], scales: Floats, out: Floats) -> Floats:
    """Writes values [N, size] times scales [N, groups] to out; each scale is for the same number of
    consecutive values.  Returns out as [N, groups, size // groups]."""
    grouped = out.reshape(*scales.shape, -1)
    grouped[...] = values.reshape(grouped.shape)
    grouped *= scales[:, :, None]
    return grouped
