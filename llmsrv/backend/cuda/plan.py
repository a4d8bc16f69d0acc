"""A compiled program on the device.

Everything runs on one stream of the plan's own, in the order of the calls.  The host stages a step
in pinned memory, enqueues its copy and its kernels, and returns.  It waits only to read samples,
so it enqueues the next step while this one runs.  The ids that a step samples stay on the device,
where the next step's embedding reads them.
"""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import numpy as np

from llmsrv.backend.arrays import Array
from llmsrv.backend.base import BLOCK_SIZE
from llmsrv.backend.base import Batch
from llmsrv.backend.base import Limits
from llmsrv.backend.base import PendingSamples
from llmsrv.backend.base import Plan
from llmsrv.backend.cuda.attention import AttentionKernels
from llmsrv.backend.cuda.graphs import Graphs
from llmsrv.backend.cuda.layout import Layout
from llmsrv.backend.cuda.layout import Memory
from llmsrv.backend.cuda.sampling import Sampler
from llmsrv.backend.cuda.sampling_table import CUDASamplingTable
from llmsrv.backend.cuda.staging import Staging
from llmsrv.backend.cuda.step import MAX_GRAPH_ROWS
from llmsrv.backend.cuda.step import Step
from llmsrv.backend.cuda.step import array_specs
from llmsrv.backend.cuda.step import block_table_spec
from llmsrv.backend.cuda.step import graph_sizes
from llmsrv.backend.cuda.step import padded
from llmsrv.backend.cuda.step import write_batch
from llmsrv.backend.kv_blocks import check_blocks
from llmsrv.backend.program import Program
from llmsrv.backend.sampling.samples import Samples

WARM_UP_ROWS = 256
NO_SAMPLES = Samples(np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.int32), [])


class CUDAPlan(Plan):
    """buffers: name -> array on the device, for tests"""

    is_asynchronous = True

    def __init__(
        self,
        cp: Any,
        program: Program,
        limits: Limits,
        memory: Memory,
        layout: Layout,
        attention: AttentionKernels,
        sampler: Sampler,
        table: CUDASamplingTable,
        staging: Staging,
        kv_layout: str,
        tick: Callable[[], None],
    ) -> None:
        self.sampling = table
        self.kv_layout = kv_layout
        self.buffers = memory.buffers.arrays
        self._cp = cp
        self._stream = cp.cuda.Stream(non_blocking=True)
        self._memory = memory
        self._limits = limits
        self._layout = layout
        self._attention = attention
        self._sampler = sampler
        self._staging = staging
        self._tick = tick
        self._logit_row_buffers = program.logit_row_buffers()
        self._graphs = Graphs(self._stream, self._launch_all)
        self._num_rows = self._num_logit_rows = 0  # of the last forward

    def forward(self, batch: Batch) -> None:
        num_rows, num_logit_rows = len(batch.ids), len(batch.logit_rows)
        self._num_rows, self._num_logit_rows = num_rows, num_logit_rows
        is_decode = num_logit_rows == num_rows <= MAX_GRAPH_ROWS
        with self._stream:
            if is_decode:
                size = padded(num_rows)
                self._graphs(self._staged(batch, size, size, is_decode))
            else:
                self._graphs(self._staged(batch, num_rows, num_logit_rows, is_decode))
        self._tick()

    def _staged(
        self, batch: Batch, num_rows: int, num_logit_rows: int, is_decode: bool
    ) -> Step:
        """Enqueues the copy of the step's arrays; numbers of rows include padded ones."""
        self._staging.begin()
        step = Step(self._staging.device, num_rows, num_logit_rows, is_decode)
        used = write_batch(self._staging.host, batch, num_rows)
        self._attention.plan_work(batch, self._staging.host, num_rows, is_decode)
        self._staging.upload(used)
        return step

    def _launch_all(self, step: Step) -> None:
        launches = self._layout.launches
        if step.num_logit_rows:
            launches = launches + self._layout.logit_row_launches
        for launch in launches:
            launch(step)
            self._tick()

    def sample(
        self,
        slots: Array,
        output_positions: Array,
        targets: Array | None = None,
        drafts: Array | None = None,
    ) -> Samples:
        return self.enqueue_sample(slots, output_positions, targets, drafts).read()

    def enqueue_sample(
        self,
        slots: Array,
        output_positions: Array,
        targets: Array | None = None,
        drafts: Array | None = None,
    ) -> PendingSamples:
        with self._stream:
            if len(slots):
                return self._sampler.enqueue(slots, output_positions, targets, drafts)
            return self._after_forward()

    def _after_forward(self) -> PendingSamples:
        done = self._stream.record()

        def read() -> Samples:
            done.synchronize()
            return NO_SAMPLES

        return PendingSamples(read)

    def read(self, name: str) -> Array:
        num_rows = self._num_logit_rows if name in self._logit_row_buffers else self._num_rows
        with self._stream:
            return self._memory.buffers.read(name, num_rows)

    def copy_block(self, source: int, target: int) -> None:
        with self._stream:
            for array in (self._memory.keys, self._memory.values):
                self._cp.copyto(array[target], array[source])

    def read_blocks(self, blocks: Sequence[int]) -> Array:
        with self._stream:
            parts = [
                [array[block].get().reshape(-1).view(np.uint8) for block in blocks]
                for array in (self._memory.keys, self._memory.values)
            ]
        block_bytes = self._memory.keys[0].nbytes
        rows = [np.array(part, np.uint8).reshape(len(blocks), block_bytes) for part in parts]
        return np.concatenate(rows, axis=1)

    def write_blocks(self, blocks: Sequence[int], data: Array) -> None:
        arrays = self._memory.keys, self._memory.values
        check_blocks(data, len(blocks), sum(array[0].nbytes for array in arrays))
        with self._stream:
            for block, row in zip(blocks, data, strict=True):
                for array, part in zip(arrays, np.split(row, len(arrays)), strict=True):
                    values = part.view(array.dtype).reshape(array[block].shape)
                    array[block].set(np.ascontiguousarray(values))
            self._stream.synchronize()  # the copies read `data`, which may change now

    def warm_up(self) -> None:
        """Runs a prompt and a step of each graph's size: compiles and loads their kernels."""
        self.forward(_dummy_prompt(min(self._limits.max_rows, WARM_UP_ROWS)))
        for size in graph_sizes(self._limits):
            with self._stream:
                self._graphs(self._staged(_no_rows(), size, size, is_decode=True))
            self._tick()
        if "logits" in self.buffers:
            self.sample(np.zeros(1, np.int32), np.zeros(1, np.int64))


def _dummy_prompt(num_rows: int) -> Batch:
    """The rows of a prompt, all stored in block 0, which is never allocated."""
    positions = np.arange(num_rows, dtype=np.int32)
    zeros = np.zeros_like(positions)
    tables = np.zeros((1, -(-num_rows // BLOCK_SIZE)), np.int32)
    slots = (positions % BLOCK_SIZE).astype(np.int64)
    return Batch(zeros, positions, zeros, slots, tables, np.zeros(1, np.bool_), positions[-1:])


def _no_rows() -> Batch:
    none = np.zeros(0, np.int32)
    return Batch(none, none, none, none, np.zeros((0, 1), np.int32), none, none)


def plan_staging(cp: Any, limits: Limits, attention: AttentionKernels) -> Staging:
    """The arrays of a step, and those of attention."""
    tables = {"block_tables": block_table_spec(limits)}
    return Staging(cp, array_specs(limits) | attention.arrays() | tables)
