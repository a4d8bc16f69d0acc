"""The arrays of a step: filled in pinned host memory, and copied to the device all at once.

While the device copies or computes one step, the host fills the arrays of the next.  So there are
two sets of host arrays, used in turns, but only one of device arrays: the device executes copies
and kernels in order.  Device arrays never move, so a captured CUDA graph can read them.

All arrays lie in one buffer.  The last one may be large and mostly unused, such as block tables:
only the part of it that is used is copied.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from llmsrv.backend.arrays import Array
from llmsrv.backend.arrays import Bytes

ALIGNMENT = 256  # of CUDA's own allocations
NUM_SETS = 2

Spec = tuple[tuple[int, ...], npt.DTypeLike]  # shape and dtype


class Staging:
    """Host and device arrays by name.

    host    name -> the array to fill for the next upload; another one after each begin()
    device  name -> the array on the device that kernels read
    """

    def __init__(self, cp: Any, specs: Mapping[str, Spec]) -> None:
        self._cp = cp
        self._starts: dict[str, int] = {}
        end = 0
        for name, (shape, dtype) in specs.items():
            self._starts[name] = end
            end += -(-int(np.prod(shape)) * np.dtype(dtype).itemsize // ALIGNMENT) * ALIGNMENT
        self._last = name
        self._pinned = [pinned_array(cp, end) for _ in range(NUM_SETS)]
        self._buffer = cp.zeros(end, np.uint8)
        # When the set's last copy has been made; an event that was never recorded has happened.
        self._copied = [cp.cuda.Event(disable_timing=True) for _ in range(NUM_SETS)]
        self._sets = [self._views(buffer, specs) for buffer in self._pinned]
        self._turn = 0
        self.host: dict[str, Array] = self._sets[0]
        self.device: dict[str, Any] = self._views(self._buffer, specs)

    def begin(self) -> None:
        """Takes the other set of host arrays; they hold what they held two steps ago."""
        self._turn = (self._turn + 1) % NUM_SETS
        self._copied[self._turn].synchronize()
        self.host = self._sets[self._turn]

    def upload(self, used_of_last: int) -> None:
        """Enqueues the copy on the current stream.

        used_of_last  how many elements of the last array to copy; all others are copied in full
        """
        end = self._starts[self._last] + used_of_last * self.host[self._last].itemsize
        stream = self._cp.cuda.get_current_stream()
        self._buffer[:end].set(self._pinned[self._turn][:end], stream)
        self._copied[self._turn].record(stream)

    def _views(self, buffer: Any, specs: Mapping[str, Spec]) -> dict[str, Any]:
        views = {}
        for name, (shape, dtype) in specs.items():
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            start = self._starts[name]
            views[name] = buffer[start : start + size].view(dtype).reshape(shape)
        return views


def pinned_array(cp: Any, num_bytes: int) -> Bytes:
    """Host memory that the device copies from and to without the host's help."""
    memory = cp.cuda.alloc_pinned_memory(num_bytes)
    array: Bytes = np.frombuffer(memory, np.uint8, num_bytes)
    array[:] = 0
    return array
