"""Device memory: allocations of the default pool, which keeps what is freed, as cupy's does."""

import weakref
from typing import Any

import numpy as np
from cuda_on_cpu import options

from cupy.cuda.stream import get_current_stream

__all__ = ["MemoryPointer", "MemoryPool", "OutOfMemoryError"]

ALIGNMENT = 512  # of cupy's pool
POISONED_BYTES = 64 << 20  # at the beginning; filling all of a large cache would take too long


class OutOfMemoryError(MemoryError):
    def __init__(self, size: int, total: int, limit: int = 0) -> None:
        super().__init__(
            f"Out of memory allocating {size:,} bytes (allocated so far: {total:,} bytes)."
        )


class Allocation:
    """Memory from the pool, until nothing refers to it.  Fresh memory holds NaN, or -1."""

    def __init__(self, num_bytes: int) -> None:
        # cupy allows it if the pool happens to have a block that is free.
        get_current_stream()._refuse_in_capture("an allocation")
        rounded = max(1, -(-num_bytes // ALIGNMENT)) * ALIGNMENT
        get_default_memory_pool()._take(rounded)
        weakref.finalize(self, get_default_memory_pool()._give_back, rounded)
        buffer = np.empty(rounded + ALIGNMENT, np.uint8)
        start = -buffer.ctypes.data % ALIGNMENT
        self.bytes = buffer[start : start + num_bytes]
        self.bytes[:POISONED_BYTES] = 0xFF


class MemoryPointer:
    """What ndarray.data is: an address that a kernel takes as an argument."""

    def __init__(self, ptr: int, allocation: Allocation, extent: tuple[int, int]) -> None:
        self.ptr = ptr
        self._allocation = allocation
        self._extent = extent

    def __int__(self) -> int:
        return self.ptr


class MemoryPool:
    def __init__(self, allocator: Any = None) -> None:
        self._used = self._total = self._limit = 0

    def _take(self, num_bytes: int) -> None:
        total = max(self._total, self._used + num_bytes)
        limit = self._limit or options.memory_bytes()
        if total > limit:
            raise OutOfMemoryError(num_bytes, self._total, self._limit)
        self._used += num_bytes
        self._total = total

    def _give_back(self, num_bytes: int) -> None:
        self._used -= num_bytes

    def used_bytes(self) -> int:
        return self._used

    def free_bytes(self) -> int:
        return self._total - self._used

    def total_bytes(self) -> int:
        return self._total

    def free_all_blocks(self, stream: Any = None) -> None:
        self._total = self._used

    def set_limit(self, size: int | None = None, fraction: float | None = None) -> None:
        self._limit = size if size is not None else int((fraction or 0) * options.memory_bytes())

    def get_limit(self) -> int:
        return self._limit


_pool = MemoryPool()


def get_default_memory_pool() -> MemoryPool:
    return _pool
