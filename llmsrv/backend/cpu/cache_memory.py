"""The memory of the KV cache: given by the system as it is written, and asked for a little earlier.

Most of a cache is never used, so it is not to be resident.  But a page that a step is the first to
write holds up that step: huge ones take 0.3 ms to clear, and 5 ms in a virtual machine whose host
has not given it that memory before.  So a thread has the next pages given while steps go on, small
ones and with rests.  It is as urgent as all others: what it may hold, they must not wait for.
"""

import ctypes
import sys
import threading

import numpy as np

from llmsrv.backend.arrays import Array
from llmsrv.backend.cpu.library import Memory
from llmsrv.backend.cpu.library import address_of

AHEAD_BYTES = 32 << 20  # of keys and values together
LEAST_BYTES = 8 << 20  # that are worth a thread


class CacheMemory:
    """keys, values  [num_blocks, num_layers, num_kv_heads, head_bytes] uint8, as kv_cache.h has
    them"""

    def __init__(
        self, library: ctypes.CDLL, memory: Memory, shape: tuple[int, int, int, int]
    ) -> None:
        self.keys = memory.array(shape, np.uint8, wants_huge_pages=True)
        self.values = memory.array(shape, np.uint8, wants_huge_pages=True)
        self._library = library
        block_bytes = 2 * self.keys[0].nbytes
        self._num_ahead = AHEAD_BYTES // block_bytes
        self._num_least = max(1, LEAST_BYTES // block_bytes)
        self._num_populated = 0
        self._thread: threading.Thread | None = None
        self.will_use(0)

    def will_use(self, block: int) -> None:
        """The blocks up to this one are about to be used; the next ones are likely to be soon."""
        end = min(len(self.keys), block + 1 + self._num_ahead)
        is_near = end - self._num_populated < self._num_least
        if is_near or sys.platform != "linux" or (self._thread and self._thread.is_alive()):
            return
        new = slice(max(self._num_populated, block), end)
        arguments = self._library, self.keys[new], self.values[new]
        self._thread = threading.Thread(
            target=_populate, args=arguments, name="kv-cache", daemon=True
        )
        self._thread.start()
        self._num_populated = end


def _populate(library: ctypes.CDLL, *arrays: Array) -> None:
    for array in arrays:
        library.llmsrv_prefault(address_of(array), array.nbytes)
