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
from llmsrv.backend.cuda.source import Kernels
from llmsrv.backend.cuda.weights import Part
from llmsrv.backend.cuda.weights import Weights

GROUP_ROWS = 8  # rows of x that one mma multiplies
MAX_GROUPS = 4
THREADS = 256  # of a block, in linear.cu and norm.cu
EMBED_THREADS = 128
# linear.cu: blocks a multiprocessor that are left when each computes several tiles of rows.
MIN_BLOCKS = 8
# Beyond this much dynamic shared memory, a kernel has to ask for it.
PLAIN_SHARED_BYTES = 40 << 10
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
        if norm is not None and not self._fuses_norm(x, num_rows):
            self.norm(norm.normed, x, norm.weight, norm.eps, num_rows)
            x, norm = norm.normed, None
        for part in weights.parts:
            columns = -(-weights.columns // BLOCK_COLUMNS) * BLOCK_COLUMNS
            first, end = part.first_column, part.first_column + part.width
            epilogue = (
                bias if bias is None or gated else bias[first:end],
                np.float32(scale),
                np.float32(softcap or 0),
                np.int32(GATED[gated]),
                np.int32(accumulate),
            )
            self._few_rows(out[:, first:], x, part, num_rows, columns, epilogue, norm)

    def _fuses_norm(self, x: Any, num_rows: int) -> bool:
        """The normalized rows must fit into the shared memory of a block, two of which should fit
        into a multiprocessor."""
        needed = GROUP_ROWS * 2 * _normed_stride(int(x.shape[1]))
        return num_rows <= GROUP_ROWS and 2 * needed <= self._device.max_shared_bytes

    def _few_rows(
        self,
        out: Any,
        x: Any,
        part: Part,
        num_rows: int,
        columns: int,
        epilogue: tuple[Any, ...],
        norm: NormWeight | None,
    ) -> None:
        groups = min(MAX_GROUPS, 1 << ((num_rows - 1) // GROUP_ROWS).bit_length())
        kernel = self._kernels.get(
            "linear", "linear", FORMAT=part.format, ROW_GROUPS=groups, NORM=int(norm is not None)
        )
        tiles_per_block, shared_bytes = 1, 0
        norm_arguments = None, np.int32(0), np.float32(0), np.int32(0)
        if norm is not None:
            blocks = MIN_BLOCKS * self._device.num_multiprocessors
            tiles_per_block = max(1, part.row_tiles // blocks)
            stride = _normed_stride(columns)
            shared_bytes = num_rows * 2 * stride
            if shared_bytes > PLAIN_SHARED_BYTES:
                kernel.max_dynamic_shared_size_bytes = shared_bytes
            norm_arguments = (
                norm.weight,
                np.int32(norm.weight.size),
                np.float32(norm.eps),
                np.int32(stride),
            )
        grid = (
            -(-part.row_tiles // tiles_per_block),
            -(-num_rows // (GROUP_ROWS * groups)),
        )
        kernel(
            grid,
            (THREADS,),
            (
                out,
                np.int64(_stride(out)),
                x,
                np.int64(_stride(x)),
                *part.pointers(),
                np.int32(num_rows),
                np.int32(part.width),
                np.int32(columns),
                np.int32(part.column_tiles),
                np.int32(part.row_tiles),
                np.int32(tiles_per_block),
                *epilogue,
                *norm_arguments,
            ),
            shared_mem=shared_bytes,
        )

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


def _stride(array: Any) -> int:
    """Values from one row to the next."""
    return int(array.strides[0] // array.itemsize)


def _normed_stride(columns: int) -> int:
    """In shared memory: an odd multiple of 32 T16, so that the eight rows of x that a warp reads
    lie in different banks."""
    return (-(-columns // BLOCK_COLUMNS) | 1) * BLOCK_COLUMNS
