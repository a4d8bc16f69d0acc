"""The memory of the KV cache: made resident shortly before it is used.

Most of a cache is never used, so it should not all be resident.  But the first write to a page
delays its step: clearing a huge page takes 0.3 ms, or 5 ms in a virtual machine whose host has not
provided that memory before.  So a thread pre-faults the next pages while steps run, in small pages
and with rests.  It has normal priority: other threads may wait for a lock that it holds.
"""

import ctypes
import sys
import threading

import numpy as np

from llmsrv.backend.arrays import Array
from llmsrv.backend.cpu.library import Memory
from llmsrv.backend.cpu.library import address_of

AHEAD_BYTES = 32 << 20  # to pre-fault, keys and values together
MIN_BYTES = 8 << 20  # worth starting a thread for


class CacheMemory:
    """The KV cache.

    keys, values  [num_blocks, num_layers, num_kv_heads, head_bytes] uint8, laid out by kv_cache.h
    """

    def __init__(
        self, library: ctypes.CDLL, memory: Memory, shape: tuple[int, int, int, int]
    ) -> None:
        self.keys = memory.array(shape, np.uint8, wants_huge_pages=True)
        self.values = memory.array(shape, np.uint8, wants_huge_pages=True)
        self._library = library
        block_bytes = 2 * self.keys[0].nbytes
        self._blocks_ahead = AHEAD_BYTES // block_bytes
        self._min_blocks = max(1, MIN_BYTES // block_bytes)
        self._num_prefaulted = 0
        self._thread: threading.Thread | None = None
        self.will_use(0)

    def will_use(self, block: int) -> None:
        """Announces that blocks up to this one are about to be used; pre-faults those after it."""
        end = min(len(self.keys), block + 1 + self._blocks_ahead)
        is_near = end - self._num_prefaulted < self._min_blocks
        if is_near or sys.platform != "linux" or (self._thread and self._thread.is_alive()):
            return
        new = slice(max(self._num_prefaulted, block), end)
        arguments = self._library, self.keys[new], self.values[new]
        self._thread = threading.Thread(
            target=_prefault, args=arguments, name="kv-cache", daemon=True
        )
        self._thread.start()
        self._num_prefaulted = end


def _prefault(library: ctypes.CDLL, *arrays: Array) -> None:
    for array in arrays:
        library.llmsrv_prefault(address_of(array), array.nbytes)
