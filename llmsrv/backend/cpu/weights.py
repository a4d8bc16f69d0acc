"""Packs weights into the groups of linear_formats.h: one region a thread, in order of execution.

Values stay as they are in the file.  Types without kernels become float32.
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
# Products prefetch this far ahead, which may be beyond the end of a region.
MARGIN_BYTES = 16384
# Values packed at once; then their pages of the mapped file are dropped.
PIECE_VALUES = 1 << 20


class Stack(NamedTuple):
    """The weights of a product, stacked along rows.

    is_paired: two tensors of the same format and shape, whose groups of rows alternate
    """

    tensors: tuple[Tensor, ...]
    is_paired: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(tensor.name for tensor in self.tensors)


class Weights:
    """Packs the stacked weights of products into one region of memory for each thread."""

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
        self._kept: list[object] = []  # what the parts point to
        sizes = [0] * num_threads
        for stack in stacks:
            for format, _, rows, columns in _runs(stack.tensors):
                bounds = self._bounds(rows, stack.is_paired)
                for thread in range(num_threads):
                    groups = bounds[thread + 1] - bounds[thread]
                    sizes[thread] += _aligned(groups * self._group_bytes(format, columns))
        memory = Memory(library)
        self._regions = [
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
        """Each thread's first group, and the end of the last thread's."""
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
                groups[thread] = address_of(self._regions[thread]) + self._used[thread]
                self._used[thread] += _aligned(int(bounds[thread + 1] - bounds[thread]) * size)
            part.format = FORMATS[format]
            part.rows, part.columns, part.first_column = rows, columns, first_column
            part.bounds, part.groups = address_of(bounds), address_of(groups)
            self._kept += [bounds, groups]
            if stack.is_paired:
                for i, tensor in enumerate(tensors):
                    first = groups + i * size
                    self._pack(format, [tensor], columns, bounds // 2, first, group_stride=2)
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
        group_stride: int = 1,
    ) -> None:
        """Packs each thread's rows of the stacked tensors into groups `group_stride` apart."""

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
                group_stride,
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
    """Stacked tensors, cut into small pieces that each belong to one thread: the tensor, its first
    row in the stack, the piece's first and end row in the stack, the thread."""
    start = 0
    for tensor in tensors:
        step = max(1, PIECE_VALUES // tensor.shape[1])
        for thread, (begin, end) in enumerate(pairwise(bounds)):
            last = min(start + tensor.shape[0], end)
            for first in range(max(start, begin), last, step):
                yield tensor, start, first, min(first + step, last), thread
        start += tensor.shape[0]


def _runs(stack: Sequence[Tensor]) -> Iterator[tuple[str, list[Tensor], int, int]]:
    """Runs of neighbours of one format: the format, the tensors, total rows, columns."""
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
    """The format the tensor is packed to: its own type, or float32."""
    return tensor.type if tensor.type in FORMATS else "F32"


def _converted(type: str, data: Array, columns: int, format: str) -> Array:
    """Rows of a tensor, [rows, bytes]; as float32 if its type has no kernel."""
    if type == format:
        return data
    values = np.empty((len(data), columns), np.float32)
    dequantize(type, data.reshape(-1), values)
    return values.view(np.uint8)
