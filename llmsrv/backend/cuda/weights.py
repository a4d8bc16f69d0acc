"""Uploads weights to the device, in the tiles and planes of kernels/cuda/formats.cuh.

Values stay as they are in the file.  Types without a format of their own become T16.
"""

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
from llmsrv.backend.program import Tensor

# Values packed at once: enough to copy efficiently, few enough for numpy's temporaries.
PIECE_VALUES = 1 << 21
NUM_PACKERS = 4


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
        """The kernels' arguments for the planes; CuPy passes None as a null pointer."""
        return tuple(self.planes.get(name) for name in PLANES)


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
    tick       called after every piece of a few megabytes
    """
    runs = [tuple(run) for _, run in groupby(tensors, format_of)]
    parts: list[Part] = []
    for run in runs:
        first_column = parts[-1].first_column + parts[-1].width if parts else 0
        parts.append(_Run(cp, run, dtype, is_paired).upload(first_column, tick))
    return Weights(tuple(parts), tensors[0].shape[1], is_paired)


def packed_bytes(tensors: Sequence[Tensor], is_paired: bool = False) -> int:
    """What pack() allocates for them."""
    total = 0
    for format, run in groupby(tensors, format_of):
        shapes = [tensor.shape for tensor in run]
        row_tiles = _row_tiles([rows for rows, _ in shapes], is_paired)
        total += row_tiles * sum(FORMATS[format].row_tile_bytes(shapes[0][1]).values())
    return total


def _row_tiles(rows: Sequence[int], is_paired: bool) -> int:
    return -(-rows[0] // (TILE_ROWS // 2)) if is_paired else -(-sum(rows) // TILE_ROWS)


class _Run:
    """Tensors of one format, stacked or paired."""

    def __init__(self, cp: Any, tensors: tuple[Tensor, ...], dtype: str, is_paired: bool) -> None:
        self._cp = cp
        self._tensors = tensors
        self._dtype = dtype
        self._is_paired = is_paired
        self._format = format_of(tensors[0])
        self._row_tiles = _row_tiles([tensor.shape[0] for tensor in tensors], is_paired)

    def upload(self, first_column: int, tick: Callable[[], None]) -> Part:
        columns = self._tensors[0].shape[1]
        sizes = FORMATS[self._format].row_tile_bytes(columns)
        planes = {
            name: self._cp.empty(self._row_tiles * size, np.uint8) for name, size in sizes.items()
        }
        step = max(1, PIECE_VALUES // (TILE_ROWS * columns))
        starts = range(0, self._row_tiles, step)
        with ThreadPoolExecutor(NUM_PACKERS) as packers:
            # A few at a time: what is packed waits in host memory until it is uploaded.
            for batch in range(0, len(starts), NUM_PACKERS):
                some = starts[batch : batch + NUM_PACKERS]
                packed = packers.map(lambda start: self._tiles(start, start + step), some)
                for start, tiles in zip(some, packed):
                    for name, piece in tiles.items():
                        first = start * sizes[name]
                        planes[name][first : first + piece.size].set(piece)
                    tick()
        width = sum(tensor.shape[0] for tensor in self._tensors) // (1 + self._is_paired)
        column_tiles = FORMATS[self._format].column_tiles(columns)
        return Part(self._format, planes, width, first_column, self._row_tiles, column_tiles)

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
                pieces.append(planes_of_rows(tensor, first, last, self._dtype))
                drop_pages(tensor.data.reshape(num_rows, -1)[first:last])
            offset += num_rows
        planes = {}
        for name in pieces[0]:
            rows = np.concatenate([piece[name] for piece in pieces])
            rows = np.pad(rows, [(0, -len(rows) % rows_a_tile), (0, 0), (0, 0)])
            planes[name] = rows.reshape(-1, rows_a_tile, *rows.shape[1:])
        return planes
