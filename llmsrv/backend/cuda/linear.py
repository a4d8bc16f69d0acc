"""Launches the kernels of products, norms, conversions and embeddings.

Arrays are on the device, [rows, stride] with a stride that is a multiple of 32 values.  A float32
array is a plain buffer; an operand is T16, with zeros from its width to its stride.
"""

from dataclasses import dataclass
from typing import Any
from typing import Literal

import numpy as np

from llmsrv.backend.cuda.device import Device
from llmsrv.backend.cuda.pack import BLOCK_COLUMNS
from llmsrv.backend.cuda.pack import FORMATS
from llmsrv.backend.cuda.pack import Format
from llmsrv.backend.cuda.pack import PLANES
from llmsrv.backend.cuda.pack import TILE_ROWS
from llmsrv.backend.cuda.source import Kernels
from llmsrv.backend.cuda.source import NULL
from llmsrv.backend.cuda.source import or_null
from llmsrv.backend.cuda.weights import Part
from llmsrv.backend.cuda.weights import Weights

GROUP_ROWS = 8  # rows of x that one mma multiplies
THREADS = 256  # of a block, in linear.cu and norm.cu
EMBED_THREADS = 128
# Beyond this much dynamic shared memory, a kernel has to ask for it.
PLAIN_SHARED_BYTES = 40 << 10

# linear.cu runs up to this many rows: beyond, its blocks would read x more often than weights.
MAX_FEW_ROWS = 32
# linear.cu with x in shared memory: a block computes several tiles if this many blocks a
# multiprocessor are left.
MIN_BLOCKS = 8
MAX_TILES = 2  # of 16 rows of weights that a warp multiplies at once, from 9 rows of x on

# linear_mma.cu: rows of x, and of weights, in a block.
LARGE_BLOCK = 128
SMALL_BLOCK = 64
SUMS_PADDING = 4  # float at the end of a row of a block's sums
MAX_STAGES = 8
# Columns in all stages after the first together: enough bytes in flight.  Few small blocks run at a
# time, so each needs more.
COLUMNS_AHEAD = {LARGE_BLOCK: 96, SMALL_BLOCK: 256}

GATED = {None: 0, "silu": 1, "gelu": 2}


@dataclass(frozen=True)
class NormWeight:
    """A Norm in front of a product.

    weight  [width] float32
    normed  operand; written where the norm is not fused with the product
    """

    weight: Any
    eps: float
    normed: Any


@dataclass(frozen=True)
class Groups:
    """Choices of experts, sorted by expert and cut into groups: what experts.cu writes.

    groups          int32 [max_groups, 4], see grouped.cuh
    num_groups      int32 [1]
    sorted_choices  int32
    group_rows      the most choices in a group
    max_groups      the most groups there can be
    """

    groups: Any
    num_groups: Any
    sorted_choices: Any
    group_rows: int
    max_groups: int


class LinearKernels:
    """Everything is launched on the current stream.

    is_batch_invariant  a row's bits must not depend on the number of rows
    """

    def __init__(self, kernels: Kernels, device: Device, is_batch_invariant: bool) -> None:
        self._kernels = kernels
        self._device = device
        self._is_batch_invariant = is_batch_invariant

    def linear(
        self,
        out: Any,
        x: Any,
        weights: Weights,
        num_rows: int,
        *,
        bias: Any = None,
        scale: float = 1.0,
        accumulate: bool = False,
        gated: Literal["silu", "gelu"] | None = None,
        softcap: float | None = None,
        norm: NormWeight | None = None,
    ) -> None:
        """out = softcap((x @ W.T + bias) * scale), added if `accumulate`; or an activation of it.

        out   float32; operand if gated, which needs paired weights
        x     operand; with a norm, float32
        bias  float32, one value for each row of the stacked weights
        """
        assert weights.is_paired == (gated is not None)
        is_fused = self._fits_shared_memory(weights.columns, num_rows)
        if norm is not None and (self._is_batch_invariant or not is_fused):
            self.norm(norm.normed, x, norm.weight, norm.eps, num_rows)
            x, norm = norm.normed, None
        for part in weights.parts:
            first, end = part.first_column, part.first_column + part.width
            part_bias = bias if bias is None or gated else bias[first:end]
            epilogue = _epilogue(part_bias, scale, softcap, gated, accumulate)
            product = _Product(out[:, first:end], x, part, num_rows, weights.columns, epilogue)
            if self._is_batch_invariant or num_rows > MAX_FEW_ROWS:
                self._many_rows(product)
            else:
                self._few_rows(product, norm)

    def grouped(
        self,
        out: Any,
        x: Any,
        weights: Weights,
        groups: Groups,
        chosen_of_x: int,
        gated: Literal["silu", "gelu"] | None = None,
    ) -> None:
        """Row c of `out` = row c // chosen_of_x of x @ W.T, with W of the choice's expert.

        out      float32; operand if gated, which needs paired weights
        weights  of all experts, from pack_experts
        """
        [part] = weights.parts
        epilogue = _epilogue(None, 1.0, None, gated, False)
        rows = groups, chosen_of_x
        product = _Product(out, x, part, groups.group_rows, weights.columns, epilogue, rows)
        if groups.group_rows > MAX_FEW_ROWS:
            self._many_rows(product)
        else:
            self._few_rows(product, None)

    def group_rows(self, num_choices: int, num_experts: int) -> int:
        """The size of groups that suits the average number of choices of an expert."""
        average = -(-num_choices // num_experts)
        if average <= MAX_FEW_ROWS and not self._is_batch_invariant:
            # Twice the average: few experts then need a second group, which reads weights again.
            return min(MAX_FEW_ROWS, GROUP_ROWS << (-(-2 * average // GROUP_ROWS) - 1).bit_length())
        return LARGE_BLOCK if average > SMALL_BLOCK and self._can_be_large() else SMALL_BLOCK

    def _fits_shared_memory(self, columns: int, num_rows: int) -> bool:
        """Whether linear.cu keeps x in shared memory: few rows, and small enough for two blocks to
        fit into a multiprocessor."""
        needed = num_rows * 2 * _shared_stride(columns)
        return num_rows <= GROUP_ROWS and 2 * needed <= self._device.max_shared_bytes

    def _few_rows(self, product: "_Product", norm: NormWeight | None) -> None:
        part, num_rows = product.part, product.num_rows
        groups = 1 << (-(-num_rows // GROUP_ROWS) - 1).bit_length()
        num_blocks = self._device.num_multiprocessors
        tiles = MAX_TILES if groups > 1 and part.row_tiles >= MAX_TILES * num_blocks else 1
        macros: dict[str, int | str] = {"FORMAT": part.format, "ROW_GROUPS": groups, "TILES": tiles}
        tiles_per_block, stride, shared_bytes = tiles, 0, 0
        norm_arguments: tuple[Any, ...] = (NULL, np.int32(0), np.float32(0))
        if self._fits_shared_memory(product.columns, num_rows):
            macros["STAGED" if norm is None else "NORM"] = 1
            tiles_per_block = max(1, part.row_tiles // (MIN_BLOCKS * num_blocks))
            stride = _shared_stride(product.columns)
            shared_bytes = num_rows * 2 * stride
        if norm is not None:
            size, eps = np.int32(norm.weight.size), np.float32(norm.eps)
            norm_arguments = norm.weight, size, eps
        kernel = self._kernels.get("linear", "linear", **macros, **product.macros())
        arguments = (
            *product.arguments(),
            np.int32(tiles_per_block),
            np.int32(stride),
            *norm_arguments,
            *product.group_arguments(),
        )
        grid = -(-part.row_tiles // tiles_per_block), product.row_blocks(GROUP_ROWS * groups)
        _launch(kernel, grid, THREADS, arguments, shared_bytes)

    def _many_rows(self, product: "_Product") -> None:
        part, format = product.part, FORMATS[product.part.format]

        def num_blocks(size: int) -> int:
            return product.row_blocks(size) * -(-part.row_tiles * TILE_ROWS // size)

        size = SMALL_BLOCK
        if product.num_rows > SMALL_BLOCK and self._can_be_large():
            if product.groups or num_blocks(LARGE_BLOCK) >= self._device.num_multiprocessors:
                size = LARGE_BLOCK
        stages = self._num_stages(format, size)
        kernel = self._kernels.get(
            "linear_mma",
            "linear_mma",
            FORMAT=part.format,
            BLOCK_ROWS=size,
            BLOCK_WIDTH=size,
            STAGES=stages,
            **product.macros(),
        )
        threads = 128 if part.format == "T16" else 256
        arguments = *product.arguments(), *product.group_arguments()
        shared_bytes = max(stages * _stage_bytes(format, size), 4 * size * (size + SUMS_PADDING))
        _launch(kernel, (num_blocks(size),), threads, arguments, shared_bytes)

    def _num_stages(self, format: Format, size: int) -> int:
        """Two small blocks should fit into a multiprocessor.  Before sm_80 copies are synchronous,
        and more than two stages are of no use."""
        if self._device.capability < 80:
            return 2
        wanted = 1 + -(-COLUMNS_AHEAD[size] // (format.blocks * BLOCK_COLUMNS))
        bytes = self._device.max_shared_bytes // (1 if size == LARGE_BLOCK else 2)
        return max(2, min(wanted, MAX_STAGES, bytes // _stage_bytes(format, size)))

    def _can_be_large(self) -> bool:
        """Large blocks need more shared memory than devices before sm_80 have."""
        return self._device.capability >= 80

    def embed(
        self, out: Any, table: Weights, ids: Any, sampled_ids: Any, num_rows: int, scale: float
    ) -> None:
        """out = table[ids] * scale.

        out          float32
        ids          [num_rows] int32; -1 - r stands for sampled_ids[r], or for 0 if that is FAILED
        sampled_ids  int32
        """
        [part] = table.parts
        self._kernels.get("embed", "embed", FORMAT=part.format)(
            (num_rows,),
            (EMBED_THREADS,),
            (
                out,
                np.int64(_stride(out)),
                *part.pointers(),
                ids,
                sampled_ids,
                np.int32(table.columns),
                np.int32(part.column_tiles),
                np.float32(scale),
            ),
        )

    def norm(
        self,
        out: Any,
        x: Any,
        weight: Any,
        eps: float,
        num_rows: int,
        accumulate: bool = False,
    ) -> None:
        """out = rmsnorm(x) * weight, added if `accumulate`.

        out     operand, or float32; float32 if `accumulate`
        weight  [width] float32
        """
        arguments: tuple[Any, ...] = (
            out,
            np.int64(_stride(out)),
            x,
            np.int64(_stride(x)),
            weight,
            np.int32(weight.size),
            np.float32(eps),
        )
        if out.dtype == np.float32:
            arguments = *arguments, np.int32(accumulate)
            kernel = self._kernels.get("norm", "norm_rows_float")
        else:
            kernel = self._kernels.get("norm", "norm_rows")
        kernel((num_rows,), (THREADS,), arguments)

    def convert(self, out: Any, x: Any, width: int, num_rows: int) -> None:
        """The operand `out` = x, which is float32."""
        self._kernels.get("norm", "convert_rows")(
            (num_rows,),
            (THREADS,),
            (out, np.int64(_stride(out)), x, np.int64(_stride(x)), np.int32(width)),
        )


@dataclass(frozen=True)
class _Product:
    """One part of a product, and the arguments that its kernels share, in their order.

    num_rows  of x; of a group, at most
    columns   of the weights
    groups    and how many choices read a row of x
    """

    out: Any
    x: Any
    part: Part
    num_rows: int
    columns: int
    epilogue: tuple[Any, ...]
    groups: tuple[Groups, int] | None = None

    def macros(self) -> dict[str, int]:
        return {"GROUPED": 1} if self.groups else {}

    def row_blocks(self, block_rows: int) -> int:
        """How many blocks the rows take."""
        return self.groups[0].max_groups if self.groups else -(-self.num_rows // block_rows)

    def arguments(self) -> tuple[Any, ...]:
        return (
            self.out,
            np.int64(_stride(self.out)),
            self.x,
            np.int64(_stride(self.x)),
            *self.part.pointers(),
            np.int32(self.num_rows),
            np.int32(self.part.width),
            np.int32(-(-self.columns // BLOCK_COLUMNS) * BLOCK_COLUMNS),
            np.int32(self.part.column_tiles),
            np.int32(self.part.row_tiles),
            *self.epilogue,
        )

    def group_arguments(self) -> tuple[Any, ...]:
        if self.groups is None:
            return NULL, NULL, NULL, np.int32(0)
        groups, chosen_of_x = self.groups
        return groups.groups, groups.num_groups, groups.sorted_choices, np.int32(chosen_of_x)


def _epilogue(
    bias: Any, scale: float, softcap: float | None, gated: str | None, accumulate: bool
) -> tuple[Any, ...]:
    """The arguments of epilogue.cuh."""
    return (
        or_null(bias),
        np.float32(scale),
        np.float32(softcap or 0),
        np.int32(GATED[gated]),
        np.int32(accumulate),
    )


def _launch(
    kernel: Any, grid: tuple[int, ...], threads: int, arguments: tuple[Any, ...], shared_bytes: int
) -> None:
    if shared_bytes > PLAIN_SHARED_BYTES:
        kernel.max_dynamic_shared_size_bytes = shared_bytes
    kernel(grid, (threads,), arguments, shared_mem=shared_bytes)


def _stage_bytes(format: Format, size: int) -> int:
    """The size of a Stage of linear_mma.cu: columns of x, and every plane of the weights."""
    bytes = size * format.blocks * BLOCK_COLUMNS * 2
    return bytes + sum(size * format.plane_bytes.get(name, 0) or 16 for name in PLANES)


def _stride(array: Any) -> int:
    """Values from one row to the next."""
    return int(array.strides[0] // array.itemsize)


def _shared_stride(columns: int) -> int:
    """In shared memory: an odd multiple of 32 T16, so that the eight rows of x that a warp reads
    lie in different banks."""
    return (-(-columns // BLOCK_COLUMNS) | 1) * BLOCK_COLUMNS
