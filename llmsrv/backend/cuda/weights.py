"""Uploads weights to the device, in the tiles and planes of kernels/cuda/formats.cuh.

Values stay as they are in the file.  Types without a format of their own become T16.
"""

import os
from collections.abc import Callable
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from llmsrv.backend.arrays import Bytes
from llmsrv.backend.cpu.library import drop_pages
from llmsrv.backend.cuda.pack import FORMATS
from llmsrv.backend.cuda.pack import PLANES
from llmsrv.backend.cuda.pack import Planes
from llmsrv.backend.cuda.pack import TILE_ROWS
from llmsrv.backend.cuda.pack import format_of
from llmsrv.backend.cuda.pack import planes_of_rows
from llmsrv.backend.cuda.source import NULL
from llmsrv.backend.program import Tensor

# Values packed at once: enough to copy efficiently, few enough for numpy's temporaries.
PIECE_VALUES = 1 << 21
NUM_PACKERS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Part:
    """Consecutive weights of a stack that have the same format.

    planes        name -> uint8 array on the device, for each plane that the format has
    width         columns of the product that come from this part; if paired, after the activation
    first_column  the first of them
    """

    format: str
    planes: dict[str, Any]
    width: int
    first_column: int
    row_tiles: int
    column_tiles: int

    def pointers(self) -> tuple[Any, ...]:
        """The kernels' arguments for the planes: null pointers for those that it does not have."""
        return tuple(self.planes.get(name, NULL) for name in PLANES)


@dataclass(frozen=True)
class Weights:
    """The weights of a product, stacked along rows.

    columns    as in the file
    is_paired  gate and up, in tiles with 8 rows of each
    """

    parts: tuple[Part, ...]
    columns: int
    is_paired: bool

    @property
    def num_bytes(self) -> int:
        return sum(plane.nbytes for part in self.parts for plane in part.planes.values())


def pack(
    cp: Any,
    tensors: Sequence[Tensor],
    dtype: str,
    tick: Callable[[], None],
    is_paired: bool = False,
) -> Weights:
    """Uploads stacked weights.

    tensors    matrices with the same number of columns; if paired, gate and up, of one format and
               shape
    dtype      float16 or bfloat16, the type of T16
    tick       called after every few megabytes
    """
    parts: list[Part] = []
    for format, run in groupby(tensors, format_of):
        first_column = parts[-1].first_column + parts[-1].width if parts else 0
        stack = _Stack(tuple(run), format, dtype, is_paired)
        planes = stack.new_planes(cp, 1)
        stack.upload(planes, 0, tick)
        parts.append(stack.part(planes, first_column))
    return Weights(tuple(parts), tensors[0].shape[1], is_paired)


def pack_experts(
    cp: Any,
    experts: Sequence[Sequence[Tensor]],
    dtype: str,
    tick: Callable[[], None],
    is_paired: bool = False,
) -> Weights:
    """Like pack(), for the same weights of each expert; they lie one after the other, each padded
    to whole tiles.  The one part's row_tiles and width are those of an expert."""
    format = _common_format(experts)
    stacks = [_Stack(tuple(tensors), format, dtype, is_paired) for tensors in experts]
    planes = stacks[0].new_planes(cp, len(stacks))
    for expert, stack in enumerate(stacks):
        stack.upload(planes, expert, tick)
    return Weights((stacks[0].part(planes, 0),), experts[0][0].shape[1], is_paired)


def packed_bytes(tensors: Sequence[Tensor], is_paired: bool = False) -> int:
    """What pack() allocates for them."""
    runs = [(format, tuple(run)) for format, run in groupby(tensors, format_of)]
    return sum(_Stack(run, format, "", is_paired).num_bytes for format, run in runs)


def packed_experts_bytes(experts: Sequence[Sequence[Tensor]], is_paired: bool = False) -> int:
    """What pack_experts() allocates for them."""
    stack = _Stack(tuple(experts[0]), _common_format(experts), "", is_paired)
    return len(experts) * stack.num_bytes


def _common_format(experts: Sequence[Sequence[Tensor]]) -> str:
    formats = {format_of(tensor) for tensors in experts for tensor in tensors}
    return formats.pop() if len(formats) == 1 else "T16"


class _Stack:
    """Tensors that become one format, stacked or paired."""

    def __init__(
        self, tensors: tuple[Tensor, ...], format: str, dtype: str, is_paired: bool
    ) -> None:
        self._tensors = tensors
        self._format = format
        self._dtype = dtype
        self._is_paired = is_paired
        rows = sum(tensor.shape[0] for tensor in tensors)
        self._width = rows // 2 if is_paired else rows
        self._row_tiles = -(-self._width // (TILE_ROWS // 2 if is_paired else TILE_ROWS))
        self._columns = tensors[0].shape[1]
        self._row_tile_bytes = FORMATS[format].row_tile_bytes(self._columns)

    @property
    def num_bytes(self) -> int:
        return self._row_tiles * sum(self._row_tile_bytes.values())

    def new_planes(self, cp: Any, count: int) -> dict[str, Any]:
        """For `count` stacks like this one."""
        sizes = self._row_tile_bytes.items()
        return {name: cp.empty(count * self._row_tiles * size, np.uint8) for name, size in sizes}

    def part(self, planes: dict[str, Any], first_column: int) -> Part:
        column_tiles = FORMATS[self._format].column_tiles(self._columns)
        return Part(
            self._format, planes, self._width, first_column, self._row_tiles, column_tiles
        )

    def upload(self, planes: dict[str, Any], index: int, tick: Callable[[], None]) -> None:
        """To the place of stack `index` in the planes."""
        step = max(1, PIECE_VALUES // (TILE_ROWS * self._columns))
        starts = range(0, self._row_tiles, step)
        with ThreadPoolExecutor(NUM_PACKERS) as packers:
            # A few at a time: what is packed waits in host memory until it is uploaded.
            for batch in range(0, len(starts), NUM_PACKERS):
                some = starts[batch : batch + NUM_PACKERS]
                packed = packers.map(lambda start: self._tiles(start, start + step), some)
                for start, tiles in zip(some, packed):
                    for name, piece in tiles.items():
                        first = (index * self._row_tiles + start) * self._row_tile_bytes[name]
                        planes[name][first : first + piece.size].set(piece)
                    tick()

    def _tiles(self, start: int, end: int) -> Planes:
        """Row tiles [start, end), or to the last one: plane -> bytes."""
        if self._is_paired:
            rows = TILE_ROWS // 2
            halves = [
                self._in_tiles([tensor], start * rows, end * rows, rows)
                for tensor in self._tensors
            ]
            both = {name: np.concatenate([h[name] for h in halves], axis=1) for name in halves[0]}
        else:
            both = self._in_tiles(self._tensors, start * TILE_ROWS, end * TILE_ROWS, TILE_ROWS)
        # [row tile, row, column tile, bytes] -> [row tile, column tile, row, bytes]
        return {
            name: np.ascontiguousarray(plane.swapaxes(1, 2)).reshape(-1)
            for name, plane in both.items()
        }

    def _in_tiles(
        self, tensors: Sequence[Tensor], start: int, end: int, rows_a_tile: int
    ) -> dict[str, Bytes]:
        """Rows [start, end) of the stacked tensors: plane -> [row tile, row, column tile, bytes].

        Rows beyond the last tensor are zero."""
        pieces = []
        offset = 0
        for tensor in tensors:
            num_rows = tensor.shape[0]
            first, last = max(start - offset, 0), min(end - offset, num_rows)
            if first < last:
                pieces.append(planes_of_rows(tensor, first, last, self._format, self._dtype))
                drop_pages(tensor.data.reshape(num_rows, -1)[first:last])
            offset += num_rows
        planes = {}
        for name in pieces[0]:
            rows = np.concatenate([piece[name] for piece in pieces])
            rows = np.pad(rows, [(0, -len(rows) % rows_a_tile), (0, 0), (0, 0)])
            planes[name] = rows.reshape(-1, rows_a_tile, *rows.shape[1:])
        return planes
