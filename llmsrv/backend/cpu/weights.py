"""Weights in the groups of linear_formats.h: each thread's in one stretch, in the order in which
they are executed.

The values are those of the file.  Types that the products do not know become float32.
"""

import ctypes
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from llmsrv.backend.arrays import Array
from llmsrv.backend.cpu.library import FORMATS
from llmsrv.backend.cpu.library import GROUP_ROWS
from llmsrv.backend.cpu.library import Memory
from llmsrv.backend.cpu.library import WeightPart
from llmsrv.backend.cpu.library import address_of
from llmsrv.backend.cpu.library import drop_pages
from llmsrv.backend.program import Tensor
from llmsrv.backend.quants.ggml_types import dequantize

ALIGNMENT = 64
# Products fetch this far ahead of what they read, and may run over the end of a stretch.
MARGIN_BYTES = 16384
# What is packed at once, and then dropped of the mapped file.
PIECE_VALUES = 1 << 20


class Stack(NamedTuple):
    """The weights of a product, one below the other.  is_paired: two tensors alike, whose groups of
    rows lie in turn."""

    tensors: tuple[Tensor, ...]
    is_paired: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(tensor.name for tensor in self.tensors)


class Weights:
    """Packs the stacked weights of products into one stretch of memory a thread."""

    def __init__(
        self,
        library: ctypes.CDLL,
        stacks: Sequence[Stack],
        num_threads: int,
        tick: Callable[[], None],
    ) -> None:
        self._library = library
        self._num_threads = num_threads
        self._tick = tick
        self._parts: dict[tuple[str, ...], ctypes.Array[WeightPart]] = {}
        self._kept: list[object] = []  # what the parts point at
        sizes = [0] * num_threads
        for stack in stacks:
            for format, _, rows, columns in _runs(stack.tensors):
                bounds = self._bounds(rows, stack.is_paired)
                for thread in range(num_threads):
                    groups = bounds[thread + 1] - bounds[thread]
                    sizes[thread] += _aligned(groups * self._group_bytes(format, columns))
        memory = Memory(library)
        self._stretches = [
            memory.array((size + MARGIN_BYTES,), np.uint8, wants_huge_pages=True) for size in sizes
        ]
        self._used = [0] * num_threads
        with ThreadPoolExecutor(num_threads) as self._packers:
            for stack in stacks:
                self._parts[stack.names] = self._pack_stack(stack)

    def parts(self, stack: Stack) -> "ctypes.Array[WeightPart]":
        return self._parts[stack.names]

    def _group_bytes(self, format: str, columns: int) -> int:
        size: int = self._library.llmsrv_group_bytes(FORMATS[format], columns)
        return size

    def _bounds(self, rows: int, is_paired: bool) -> list[int]:
        """Where each thread's groups begin, and the last one's end."""
        unit = 1 + is_paired
        units, threads = -(-rows // (GROUP_ROWS * unit)), self._num_threads
        return [units * thread // threads * unit for thread in range(threads + 1)]

    def _pack_stack(self, stack: Stack) -> "ctypes.Array[WeightPart]":
        runs = list(_runs(stack.tensors))
        parts = (WeightPart * len(runs))()
        first_column = 0
        for part, (format, tensors, rows, columns) in zip(parts, runs):
            bounds = np.array(self._bounds(rows, stack.is_paired), np.int32)
            groups = np.zeros(self._num_threads, np.uint64)
            size = self._group_bytes(format, columns)
            for thread in range(self._num_threads):
                groups[thread] = address_of(self._stretches[thread]) + self._used[thread]
                self._used[thread] += _aligned(int(bounds[thread + 1] - bounds[thread]) * size)
            part.format = FORMATS[format]
            part.rows, part.columns, part.first_column = rows, columns, first_column
            part.bounds, part.groups = address_of(bounds), address_of(groups)
            self._kept += [bounds, groups]
            if stack.is_paired:
                for i, tensor in enumerate(tensors):
                    self._pack(format, [tensor], columns, bounds // 2, groups + i * size, every=2)
            else:
                self._pack(format, tensors, columns, bounds, groups)
            first_column += rows
        self._kept.append(parts)
        return parts

    def _pack(
        self,
        format: str,
        tensors: Sequence[Tensor],
        columns: int,
        bounds: Array,
        groups: Array,
        every: int = 1,
    ) -> None:
        """Each thread's rows of the tensors, one below the other, to groups `every` apart."""

        def pack(tensor: Tensor, start: int, first: int, end: int, thread: int) -> None:
            data = tensor.data.reshape(tensor.shape[0], -1)[first - start : end - start]
            rows = _converted(tensor.type, data, columns, format)
            self._library.llmsrv_pack(
                FORMATS[format],
                columns,
                address_of(rows),
                rows.strides[0],
                len(rows),
                first - GROUP_ROWS * int(bounds[thread]),
                every,
                int(groups[thread]),
            )
            drop_pages(data)

        pieces = list(_pieces(tensors, [GROUP_ROWS * int(bound) for bound in bounds]))
        for packed in [self._packers.submit(pack, *piece) for piece in pieces]:
            packed.result()
            self._tick()


def _pieces(
    tensors: Sequence[Tensor], bounds: Sequence[int]
) -> Iterator[tuple[Tensor, int, int, int, int]]:
    """Tensors that lie one below the other, cut where threads' rows begin, and small: the tensor,
    the row where it starts, first and end of the piece's rows, the thread."""
    start = 0
    for tensor in tensors:
        step = max(1, PIECE_VALUES // tensor.shape[1])
        for thread, (begin, end) in enumerate(pairwise(bounds)):
            last = min(start + tensor.shape[0], end)
            for first in range(max(start, begin), last, step):
                yield tensor, start, first, min(first + step, last), thread
        start += tensor.shape[0]


def _runs(stack: Sequence[Tensor]) -> Iterator[tuple[str, list[Tensor], int, int]]:
    """Neighbours of one format: the format, the tensors, their rows together, their columns."""
    run: list[Tensor] = []
    for tensor in stack:
        if run and format_of(run[0]) != format_of(tensor):
            yield format_of(run[0]), run, sum(t.shape[0] for t in run), run[0].shape[1]
            run = []
        run.append(tensor)
    yield format_of(run[0]), run, sum(t.shape[0] for t in run), run[0].shape[1]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def format_of(tensor: Tensor) -> str:
    """The format that the tensor is packed to: its own type, or float32."""
    return tensor.type if tensor.type in FORMATS else "F32"


def _converted(type: str, data: Array, columns: int, format: str) -> Array:
    """Rows of a tensor [rows, bytes]; of a type that has no format their values as float32."""
    if type == format:
        return data
    values = np.empty((len(data), columns), np.float32)
    dequantize(type, data.reshape(-1), values)
    return values.view(np.uint8)
