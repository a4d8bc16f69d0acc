"""Takes apart the bytes of quantised blocks; what quants, k_quants and iq_quants share."""

import numpy as np
import numpy.typing as npt

from llmsrv.backend.arrays import Bytes
from llmsrv.backend.arrays import Floats


def half(blocks: Bytes, at: int) -> Floats:
    """The float16 that starts at byte `at` of each block, as float32: [N, 1]."""
    return blocks[:, at:at + 2].view("<f2").astype(np.float32)


def fields(packed: Bytes, bits: int, run: int) -> Bytes:
    """Unpacks bytes [N, size], which are cut into runs of `run` bytes, into [N, size * 8 // bits].

    Of each run come the lowest `bits` bits of all its bytes, then the next ones of all, and so on:
    a run of 32 bytes holds 64 nibbles, the low halves first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    runs = packed.reshape(len(packed), packed.shape[1] // run, 1, run)
    values = runs >> shifts
    values &= np.uint8((1 << bits) - 1)
    return values.reshape(len(packed), -1)


def bits_of(packed: Bytes) -> Bytes:
    """The bits of bytes [N, size] as [N, 8 * size], those of a byte side by side, lowest first."""
    return np.unpackbits(packed, axis=1, bitorder="little")


def scaled(values: Bytes | npt.NDArray[np.int8], scales: Floats, out: Floats) -> Floats:
    """Writes values [N, size] times scales [N, groups], each over as many values, into out, and
    returns out as [N, groups, size // groups]."""
    grouped = out.reshape(*scales.shape, -1)
    grouped[...] = values.reshape(grouped.shape)
    grouped *= scales[:, :, None]
    return grouped
