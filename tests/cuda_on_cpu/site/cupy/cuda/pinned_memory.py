"""Pinned host memory, from and to which copies are asynchronous."""

import bisect
import mmap

import numpy as np

__all__ = ["PinnedMemoryPointer", "alloc_pinned_memory"]

# (first address, end) of all pinned memory, in order.  It is never unmapped: tests use little.
_ranges: list[tuple[int, int]] = []


class PinnedMemoryPointer(mmap.mmap):
    """A buffer, as cupy's is: numpy.frombuffer(pointer, dtype, count)."""

    @property
    def ptr(self) -> int:
        return int(np.frombuffer(self, np.uint8).ctypes.data)


def alloc_pinned_memory(size: int) -> PinnedMemoryPointer:
    memory = PinnedMemoryPointer(-1, max(1, size))
    bisect.insort(_ranges, (memory.ptr, memory.ptr + size))
    return memory


def is_pinned(array: np.ndarray) -> bool:
    address = array.ctypes.data
    index = bisect.bisect(_ranges, (address, 1 << 64)) - 1
    return index >= 0 and address < _ranges[index][1]
