"""Launches the kernels of rope, attention, activations and logit rows on the current stream.

Arrays are cupy arrays.  An output is float32 or an operand, as its dtype says.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from llmsrv.backend.base import Batch
from llmsrv.backend.base import Limits
from llmsrv.backend.cuda.attention_work import AttentionWork
from llmsrv.backend.cuda.attention_work import Heads
from llmsrv.backend.cuda.device import Device
from llmsrv.backend.cuda.source import Kernels
from llmsrv.backend.cuda.source import Macro
from llmsrv.backend.cuda.source import or_null
from llmsrv.backend.cuda.staging import Spec
from llmsrv.backend.cuda.step import Step
from llmsrv.backend.program import Attention
from llmsrv.backend.program import Program
from llmsrv.backend.program import RopeAndStore

DECODE_THREADS = 128
ROPE_WARPS = 8
MANY_ROWS = 256  # a block for each keeps the device busy
COLUMN_THREADS = 256  # of kernels in which a thread computes a column


@dataclass(frozen=True)
class RopeWeights:
    """The vectors of a RopeAndStore as float32 arrays; None where the operation has none."""

    frequencies: Any = None
    long_frequencies: Any = None
    q_norm: Any = None
    k_norm: Any = None


@dataclass(frozen=True)
class Tile:
    """The shape of a tile of prefill attention; see kernels/cuda/attention_mma.cu."""

    num_warps: int
    m_tiles: int
    num_keys: int

    @property
    def num_queries(self) -> int:
        return 16 * self.num_warps * self.m_tiles

    def shared_bytes(self, padded_dim: int) -> int:
        return 2 * (self.num_queries + 4 * self.num_keys) * (padded_dim + 8)

    def sum_registers(self, padded_dim: int) -> int:
        """Registers of a thread that hold scores and sums."""
        return self.m_tiles * (padded_dim + self.num_keys) // 2


# The preferred ones first.  With two m-tiles, a warp uses each key in its registers twice.
TILES = (Tile(4, 2, 64), Tile(4, 2, 32), Tile(4, 1, 32), Tile(4, 1, 16), Tile(2, 1, 16))
MAX_HEAD_DIM = 256
MAX_SUM_REGISTERS = 160  # of 255; with more, the kernel spills


def choose_tile(padded_dim: int, max_shared_bytes: int) -> Tile:
    """The first that fits.  The last one always does: 50 KiB for the largest heads, of 256."""
    for tile in TILES:
        fits = tile.shared_bytes(padded_dim) <= max_shared_bytes
        if fits and tile.sum_registers(padded_dim) <= MAX_SUM_REGISTERS:
            return tile
    return TILES[-1]


def resident_blocks(padded_dim: int) -> int:
    """Blocks of decode attention that a multiprocessor holds.  With more, registers would spill."""
    return 4 if padded_dim <= 64 else 3 if padded_dim <= 128 else 2


class AttentionKernels:
    def __init__(
        self,
        kernels: Kernels,
        device: Device,
        program: Program,
        limits: Limits,
        is_batch_invariant: bool = False,
    ) -> None:
        """is_batch_invariant: the bits of a row do not depend on other rows."""
        self._kernels = kernels
        self._heads = Heads(program.num_heads, program.num_kv_heads, program.head_dim)
        self._num_layers = np.int32(program.num_layers)
        self._tile = choose_tile(self._heads.padded_dim, device.max_shared_bytes)
        tile_rows = self._tile.num_queries // self._heads.heads_per_group
        self._work = AttentionWork(program, limits, tile_rows, is_batch_invariant)
        self._resident_blocks = resident_blocks(self._heads.padded_dim)
        self._max_grid = self._resident_blocks * device.num_multiprocessors
        self._attention: dict[tuple[Any, bool], tuple[Any, Any]] = {}
        num_splits = self._work.pass_splits if self._work.windows else 0
        shape = num_splits, self._heads.num_groups, self._heads.partial_size
        self._partials = device.cp.zeros(shape, np.float32)
        rows = self._work.max_rows
        self._arrivals = device.cp.zeros((rows, self._heads.num_groups), np.int32)

    def arrays(self) -> dict[str, Spec]:
        """The arrays of a step that plan_work fills."""
        return self._work.arrays()

    def plan_work(self, batch: Batch, host: Any, num_rows: int, is_decode: bool) -> None:
        """Fills host[name] for the step that is launched next; num_rows: with padded rows.

        is_decode  the step may run as a captured graph
        """
        self._work.plan(batch, host, num_rows, is_decode)

    def rope_and_store(
        self,
        operation: RopeAndStore,
        weights: RopeWeights,
        qkv: Any,
        q: Any,
        keys: Any,
        values: Any,
        step: Step,
    ) -> None:
        """q [rows, num_heads, padded_dim]; keys, values: the whole KV cache."""
        kernel = self._kernels.get("rope", "rope_and_store", **self._heads.macros())
        heads = self._heads
        norms_across = 0
        if operation.q_norm and operation.q_norm.shape[0] > heads.head_dim:
            norms_across |= 1
        if operation.k_norm and operation.k_norm.shape[0] > heads.head_dim:
            norms_across |= 2
        num_rotated = 0 if operation.frequencies is None else len(operation.frequencies)
        all_heads = heads.num_heads + 2 * heads.num_kv_heads
        # With many rows, a warp takes several heads and computes their cosines once.
        has_one_block = norms_across or step.num_rows >= MANY_ROWS
        num_blocks = 1 if has_one_block else -(-all_heads // ROPE_WARPS)
        kernel(
            (num_blocks, step.num_rows),
            (32 * ROPE_WARPS,),
            (
                qkv,
                np.int64(qkv.shape[1]),
                q,
                keys,
                values,
                step.device["positions"],
                step.device["sequences"],
                step.device["slot_mapping"],
                step.device["is_long"],
                or_null(weights.frequencies),
                or_null(weights.long_frequencies),
                np.int32(num_rotated),
                np.int32(operation.interleaved),
                np.float32(operation.magnitude),
                or_null(weights.q_norm),
                or_null(weights.k_norm),
                np.int32(norms_across),
                np.float32(operation.eps),
                np.int32(operation.layer),
                self._num_layers,
            ),
        )

    def attention(
        self, operation: Attention, q: Any, out: Any, keys: Any, values: Any, step: Step
    ) -> None:
        """q: as rope_and_store writes it.  out [rows, stride], stride at least the width."""
        index = self._work.windows.index(operation.window)
        device = step.device
        arrays = out, np.int64(out.shape[1]), q, keys, values
        tables = device["block_tables"], device["sizes"]
        constants = (
            np.int32(operation.layer),
            self._num_layers,
            np.float32(operation.scale),
            np.float32(operation.softcap or 0),
            np.int32(operation.window or 0),
        )
        decode, prefill = self._attention_kernels(operation, out.dtype)
        work = *tables, device[f"decode_rows_{index}"], device[f"passes_{index}"]
        results = self._partials, self._arrivals
        most_units = step.num_rows * self._heads.max_splits * self._heads.num_groups
        for number in range(self._work.num_passes[index]):
            decode(
                (min(most_units, self._max_grid),),
                (DECODE_THREADS,),
                (*arrays, *work, np.int32(number), *results, *constants),
            )
        if self._work.num_tiles:
            rows = device["positions"], device["sequences"]
            prefill(
                (self._heads.num_groups, self._work.num_tiles),
                (32 * self._tile.num_warps,),
                (*arrays, *rows, *tables, device["tiles"], *constants),
                shared_mem=self._tile.shared_bytes(self._heads.padded_dim),
            )

    def _attention_kernels(self, operation: Attention, dtype: Any) -> tuple[Any, Any]:
        """Decode and prefill attention, with output of this type."""
        has_softcap = bool(operation.softcap)
        if (dtype, has_softcap) not in self._attention:
            macros = self._heads.macros() | _output_macros(dtype)
            if has_softcap:
                macros["HAS_SOFTCAP"] = 1
            splits = {
                "MAX_SPLITS": self._heads.max_splits,
                "RESIDENT_BLOCKS": self._resident_blocks,
            }
            tile = {
                "NUM_WARPS": self._tile.num_warps,
                "M_TILES": self._tile.m_tiles,
                "TILE_KEYS": self._tile.num_keys,
            }
            decode = self._kernels.get("attention", "decode_attention", **macros, **splits)
            prefill = self._kernels.get("attention_mma", "prefill_attention", **macros, **tile)
            shared_bytes = self._tile.shared_bytes(self._heads.padded_dim)
            prefill.max_dynamic_shared_size_bytes = shared_bytes
            self._attention[dtype, has_softcap] = decode, prefill
        return self._attention[dtype, has_softcap]

    # ---- Activations and logit rows

    def gated_activation(self, x: Any, out: Any, width: int, function: str, num_rows: int) -> None:
        """x [rows, 2 * width and more] float32; out [rows, width and more]."""
        kernel = self._kernels.get("activation", "gated_activation", **_output_macros(out.dtype))
        is_gelu = np.int32(function == "gelu")
        strides = np.int64(out.shape[1]), np.int64(x.shape[1])
        _over_columns(
            kernel, out.shape[1], num_rows, out, strides[0], x, strides[1], np.int32(width), is_gelu
        )

    def select(self, x: Any, out: Any, width: int, step: Step) -> None:
        """Also pools by the last row."""
        kernel = self._kernels.get("logit_rows", "select_rows", **_output_macros(out.dtype))
        self._take_rows(kernel, x, out, width, step, step.device["logit_rows"])

    def pool_mean(self, x: Any, out: Any, width: int, step: Step) -> None:
        kernel = self._kernels.get("logit_rows", "pool_mean", **_output_macros(out.dtype))
        rows = step.device["first_rows"], step.device["logit_rows"]
        self._take_rows(kernel, x, out, width, step, *rows)

    def softcap(self, x: Any, width: int, cap: float, num_rows: int) -> None:
        """In place; x float32."""
        kernel = self._kernels.get("logit_rows", "softcap")
        stride = np.int64(x.shape[1])
        _over_columns(kernel, width, num_rows, x, stride, np.int32(width), np.float32(cap))

    def _take_rows(
        self, kernel: Any, x: Any, out: Any, width: int, step: Step, *rows: Any
    ) -> None:
        strides = np.int64(out.shape[1]), np.int64(x.shape[1])
        arguments = out, strides[0], x, strides[1], np.int32(width), *rows
        _over_columns(kernel, out.shape[1], step.num_logit_rows, *arguments)


def _over_columns(kernel: Any, num_columns: int, num_rows: int, *arguments: Any) -> None:
    grid = -(-num_columns // COLUMN_THREADS), num_rows
    kernel(grid, (COLUMN_THREADS,), arguments)


def _output_macros(dtype: Any) -> dict[str, Macro]:
    return {"FLOAT_OUT": 1} if dtype == np.float32 else {}
