"""Plans a step's attention: which rows decode, and the tiles of those that are prefill.

Decode attention splits each row over its positions, so that few rows keep the whole device busy.
Prefill attention computes tiles of consecutive rows on tensor cores.  Rows of a sequence with few
rows in the step decode.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from llmsrv.backend.arrays import Array
from llmsrv.backend.base import BLOCK_SIZE
from llmsrv.backend.base import Batch
from llmsrv.backend.base import Limits
from llmsrv.backend.cuda.staging import Spec
from llmsrv.backend.cuda.step import MAX_GRAPH_ROWS
from llmsrv.backend.cuda.step import logit_row_capacity
from llmsrv.backend.cuda.step import row_capacity
from llmsrv.backend.program import Attention
from llmsrv.backend.program import Pool
from llmsrv.backend.program import Program

# A sequence with more rows than this is prefill.  A row that decodes reads the sequence's keys and
# values for itself.
MAX_DECODE_ROWS = 8
SPLIT_BLOCKS = 4  # the fewest of a split: one for each warp of decode attention
# DecodeRow of kernels/cuda/attention.cu: row, sequence, position, first split, number of splits
DECODE_ROW_SIZE = 8


@dataclass(frozen=True)
class Heads:
    """The heads of a program, and the groups of them that a block of threads computes; see
    kernels/cuda/attention.cuh."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def padded_dim(self) -> int:
        return -(-self.head_dim // 16) * 16

    @property
    def groups_per_kv_head(self) -> int:
        return -(-self.num_heads // self.num_kv_heads // 8)

    @property
    def heads_per_group(self) -> int:
        return -(-self.num_heads // self.num_kv_heads // self.groups_per_kv_head)

    @property
    def num_groups(self) -> int:
        return self.num_kv_heads * self.groups_per_kv_head

    @property
    def max_splits(self) -> int:
        """The most splits of a row.  Times the groups of heads, that is 256 units of work or
        more: about two for each multiprocessor of a large GPU."""
        return min(max(32, 256 // self.num_groups), 128)

    @property
    def partial_size(self) -> int:
        """Floats of a group's partial results: PARTIAL_SIZE of kernels/cuda/attention_merge.cuh."""
        return -(-self.heads_per_group * (self.head_dim + 2) // 4) * 4

    def macros(self) -> dict[str, int]:
        return {
            "HEAD_DIM": self.head_dim,
            "PADDED_DIM": self.padded_dim,
            "NUM_HEADS": self.num_heads,
            "NUM_KV_HEADS": self.num_kv_heads,
        }


class AttentionWork:
    """The work lists of a step, as arrays.

    max_rows     the most rows of a step, padded ones included
    windows      the different windows of the program's Attention operations, in which the same
                 row has different splits
    num_tiles    the number of prefill tiles in the step that was planned last
    num_passes   for each window, the launches of decode attention in that step
    pass_splits  the most splits of a pass
    """

    def __init__(
        self, program: Program, limits: Limits, tile_rows: int, is_batch_invariant: bool
    ) -> None:
        """tile_rows: the most rows of a prefill tile.  is_batch_invariant: all rows decode."""
        self._heads = Heads(program.num_heads, program.num_kv_heads, program.head_dim)
        self._limits = limits
        self.max_rows = row_capacity(limits)
        self._tile_rows = tile_rows
        self._is_batch_invariant = is_batch_invariant
        attentions = [each for each in program.operations if isinstance(each, Attention)]
        self.windows = list(dict.fromkeys(each.window for each in attentions))
        self.num_tiles = 0
        self.num_passes = [0] * len(self.windows)
        # A captured graph has one pass, so this many rows always fit in a pass.
        self._pass_rows = min(self.max_rows, MAX_GRAPH_ROWS)
        self._num_splits = splits_of_blocks(limits.num_blocks, self._heads.max_splits)
        self.pass_splits = self._pass_rows * int(self._num_splits.max())
        self._all_rows = np.arange(self.max_rows)
        self._pools = any(isinstance(each, Pool) for each in program.operations)

    def arrays(self) -> dict[str, Spec]:
        """The arrays that plan() fills; n rows decode.

        tiles          [num_tiles, 2] int32: the first row, and the number of rows
        first_rows     [logit rows] int32: the first row of the logit row's sequence
        decode_rows_I  [n, DECODE_ROW_SIZE] int32, for the window with index I
        passes_I       [num_passes, 4] int32: first and end of a pass in decode_rows_I, first and
                       end of its splits.  They are at most pass_splits, which bounds the memory
                       for their results.
        """
        num_tiles = self.max_rows // self._tile_rows + self.max_rows // (MAX_DECODE_ROWS + 1) + 1
        specs: dict[str, Spec] = {
            "tiles": ((num_tiles, 2), np.int32),
            "first_rows": ((logit_row_capacity(self._limits),), np.int32),
        }
        for i in range(len(self.windows)):
            specs[f"decode_rows_{i}"] = (self.max_rows, DECODE_ROW_SIZE), np.int32
            specs[f"passes_{i}"] = (-(-self.max_rows // self._pass_rows), 4), np.int32
        return specs

    def plan(
        self, batch: Batch, host: Mapping[str, Array], num_rows: int, is_decode: bool
    ) -> None:
        """Fills the arrays in `host`, which has the batch's own already (step.write_batch).

        num_rows   with padded rows, which decode
        is_decode  all rows decode
        """
        self.num_tiles = 0
        if is_decode or self._is_batch_invariant:
            rows = self._all_rows[:num_rows]
        else:
            rows = self._plan_prefill(batch, host["tiles"], num_rows)
        positions, sequences = host["positions"][rows], host["sequences"][rows]
        for i in range(len(self.windows)):
            self._plan_splits(i, rows, positions, sequences, host)
        if self._pools:
            starts = np.flatnonzero(np.diff(batch.sequences, prepend=-1))
            last = np.searchsorted(starts, batch.logit_rows, side="right") - 1
            host["first_rows"][: len(last)] = starts[last]

    def _plan_prefill(self, batch: Batch, tiles: Array, num_rows: int) -> Array:
        """Plans the tiles; returns the other rows."""
        starts = np.flatnonzero(np.diff(batch.sequences, prepend=-1))
        lengths = np.diff(starts, append=len(batch.ids))
        is_prefill = lengths > MAX_DECODE_ROWS
        self._plan_tiles(starts[is_prefill], lengths[is_prefill], batch.positions, tiles)
        is_decode_row = np.ones(num_rows, bool)
        is_decode_row[: len(batch.ids)] = ~np.repeat(is_prefill, lengths)
        return np.flatnonzero(is_decode_row)

    def _plan_tiles(
        self, starts: Array, lengths: Array, positions: Array, tiles: Array
    ) -> None:
        """Cuts runs of rows into tiles.  Those with the most positions come first: the device
        ends its work with short ones, and so all multiprocessors at about the same time."""
        counts = -(-lengths // self._tile_rows)
        ends = np.repeat(starts + lengths, counts)
        index = np.arange(len(ends)) - np.repeat(np.cumsum(counts) - counts, counts)
        first = np.repeat(starts, counts) + index * self._tile_rows
        rows = np.minimum(ends - first, self._tile_rows)
        order = np.argsort(-positions[first], kind="stable")
        self.num_tiles = len(order)
        tiles[: len(order), 0] = first[order]
        tiles[: len(order), 1] = rows[order]

    def _plan_splits(
        self,
        index: int,
        rows: Array,
        positions: Array,
        sequences: Array,
        host: Mapping[str, Array],
    ) -> None:
        num_blocks = positions // BLOCK_SIZE + 1
        if window := self.windows[index]:
            num_blocks -= np.maximum(positions + 1 - window, 0) // BLOCK_SIZE
        splits = self._num_splits[num_blocks]
        ends = splits.cumsum()
        first_splits = ends - splits
        decode_rows = host[f"decode_rows_{index}"][: len(rows)]
        for field, values in enumerate((rows, sequences, positions, first_splits, splits)):
            decode_rows[:, field] = values
        passes = host[f"passes_{index}"]
        count = end = 0
        while end < len(rows):
            first, split = end, first_splits[end]
            end = int(ends.searchsorted(split + self.pass_splits, side="right"))
            passes[count] = first, end, split, ends[end - 1]
            count += 1
        self.num_passes[index] = count


def splits_of_blocks(most: int, max_splits: int) -> Array:
    """The number of splits of a row with 0, 1, ... `most` blocks.

    The rule is that of blocks_per_split in kernels/cuda/attention.cu.
    """
    num_blocks = np.arange(most + 1)
    blocks = np.full(most + 1, SPLIT_BLOCKS)
    while (is_short := blocks * max_splits < num_blocks).any():
        blocks[is_short] *= 2
    splits: Array = -(-num_blocks // blocks)
    return splits
