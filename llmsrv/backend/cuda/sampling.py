"""Sampling on the GPU: a step's rows in one to five kernels (kernels/cuda/sample.cuh).

The ids stay on the device, where the next step embeds them.  A copy goes to pinned memory, with
what the host needs to compute log-probabilities in float64, as the contract asks.  Nothing waits
until PendingSamples.read.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llmsrv.backend.arrays import Array
from llmsrv.backend.arrays import Bytes
from llmsrv.backend.base import Limits
from llmsrv.backend.base import PendingSamples
from llmsrv.backend.cuda.device import Device
from llmsrv.backend.cuda.sampling_layout import CHUNK
from llmsrv.backend.cuda.sampling_layout import GROUP
from llmsrv.backend.cuda.sampling_layout import NO_LINE
from llmsrv.backend.cuda.sampling_layout import NUM_BINS
from llmsrv.backend.cuda.sampling_layout import RESULT
from llmsrv.backend.cuda.sampling_layout import ROW
from llmsrv.backend.cuda.sampling_layout import STATE
from llmsrv.backend.cuda.sampling_layout import THREADS
from llmsrv.backend.cuda.sampling_layout import WRITE
from llmsrv.backend.cuda.sampling_table import CUDASamplingTable
from llmsrv.backend.cuda.sampling_table import DeviceLines
from llmsrv.backend.cuda.sampling_table import Write
from llmsrv.backend.cuda.source import Kernels
from llmsrv.backend.cuda.staging import NUM_SETS
from llmsrv.backend.cuda.staging import pinned_array
from llmsrv.backend.sampling.samples import FAILED
from llmsrv.backend.sampling.samples import Samples
from llmsrv.backend.sampling.table import WEIGHT_BITS

FIRST_BYTES = 4096  # of a transfer

KERNELS = {
    "sample_max": "sample_max",
    "sample_draw": "sample_draw",
    "sample_logprobs": "sample_logprobs",
    "write_lines": "sample_update",
    "count_ids": "sample_update",
}

Rows = npt.NDArray[np.void]


class Transfer:
    """A buffer on the device and pinned host memory to copy from or to it.

    There are two host arrays, used in turns: the host fills or reads one while the device copies
    the other.  All grow when they are too small.
    """

    def __init__(self, cp: Any) -> None:
        self._cp = cp
        self._pinned = [pinned_array(cp, FIRST_BYTES) for _ in range(NUM_SETS)]
        self._copied: list[Any] = [None] * NUM_SETS  # events: the host array's last copy is made
        self._turn = 0
        self.device = cp.zeros(FIRST_BYTES, np.uint8)

    def begin(self, num_bytes: int) -> tuple[Bytes, Any]:
        """The bytes of this step on the host and on the device."""
        self._turn = turn = (self._turn + 1) % NUM_SETS
        if self._copied[turn] is not None:
            self._copied[turn].synchronize()
        if len(self._pinned[turn]) < num_bytes:
            self._pinned[turn] = pinned_array(self._cp, 2 * num_bytes)
        if len(self.device) < num_bytes:
            self.device = self._cp.zeros(2 * num_bytes, np.uint8)
        return self._pinned[turn][:num_bytes], self.device[:num_bytes]

    def record(self) -> Any:
        """Call after enqueuing the copy.  Returns an event that waits for it."""
        event = self._copied[self._turn] = self._cp.cuda.get_current_stream().record()
        return event


class Sampler:
    """ids  [max_logit_rows] int32 on the device, what each row of the last step sampled"""

    def __init__(
        self,
        kernels: Kernels,
        device: Device,
        logits: Any,
        limits: Limits,
        table: CUDASamplingTable,
    ) -> None:
        """logits: [max_logit_rows or more, stride] float32 on the device, never reallocated."""
        cp = self._cp = device.cp
        self._kernels = {name: kernels.get(stem, name) for name, stem in KERNELS.items()}
        self._table = table
        self._lines = DeviceLines(cp, table)
        max_rows, stride = limits.max_logit_rows, logits.shape[1]
        self._num_chunks = -(-table.vocab_size // CHUNK)
        num_groups = -(-table.vocab_size // GROUP)
        self.ids = cp.zeros(max_rows, np.int32)
        self._logits = logits, np.int64(stride), np.int32(table.vocab_size)
        self._states = cp.zeros(max_rows * STATE.itemsize, np.uint8)
        self._bins = cp.zeros((max_rows, NUM_BINS), np.uint64)
        self._x = cp.zeros((max_rows, stride), np.float32)
        self._maxima = cp.zeros((max_rows, num_groups), np.float32)
        self._sums = cp.zeros((max_rows, num_groups), np.uint64)
        self._upload = Transfer(cp)
        self._download = Transfer(cp)

    def enqueue(
        self,
        slots: Array,
        output_positions: Array,
        targets: Array | None,
        drafts: Array | None,
    ) -> PendingSamples:
        """See Plan.enqueue_sample.  Enqueues on the current stream; there is at least one row."""
        rows = self._rows(slots, output_positions, targets, drafts)
        parameters = rows["parameters"]
        num_logprobs: Array = parameters["num_logprobs"]
        width = max(int(num_logprobs.max()), 0)
        device_rows, words = self._send(rows)
        first, each = len(rows) * RESULT.itemsize, 4 * len(rows) * width
        host, results = self._download.begin(first + 2 * each)
        alternatives = results[first : first + each], results[first + each :]
        grid = self._num_chunks, len(rows)
        inputs = *self._logits, device_rows
        tables = *_with_width(self._lines.lines), *_with_width(self._lines.masks), words
        found = self._states, self.ids, results
        scratch = self._maxima, self._sums
        self._launch("sample_max", grid, *inputs, *tables, *found)
        if ((parameters["temperature"] > 0) & (rows["target"] < 0)).any():
            more = self._bins, self._x, *scratch
            self._launch("sample_draw", grid, *inputs, *tables, *found, *more)
        if (num_logprobs >= 0).any():
            rest = self._states, results, self._bins, *scratch
            self._launch("sample_logprobs", grid, *inputs, *rest, np.int32(width), *alternatives)
        if (rows["lines"]["counts"] != NO_LINE).any():
            blocks, num_rows = (-(-len(rows) // THREADS), 1), np.int32(len(rows))
            lines = _with_width(self._lines.lines)
            self._launch("count_ids", blocks, device_rows, num_rows, self.ids, *lines)
        return self._pending(host, results, num_logprobs, width)

    def counts(self, slot: int) -> Array | None:
        """See DeviceLines.counts."""
        return self._lines.counts(slot)

    def _launch(self, name: str, grid: tuple[int, int], *arguments: Any) -> None:
        self._kernels[name](grid, (THREADS,), arguments)

    def _rows(
        self,
        slots: Array,
        output_positions: Array,
        targets: Array | None,
        drafts: Array | None,
    ) -> Rows:
        """Everything but the lines and the grammars of the rows."""
        rows = np.zeros(len(slots), ROW)
        rows["parameters"] = self._table.parameters[slots]
        rows["output_position"] = output_positions
        rows["target"] = -1 if targets is None else targets
        rows["draft"] = -1 if drafts is None else drafts
        if drafts is not None:
            num_drafted = 0
            for row, draft in enumerate(drafts.tolist()):
                num_drafted = num_drafted + 1 if draft >= 0 else 0
                rows["num_drafted"][row] = num_drafted
        rows["slot"] = slots
        return rows

    def _send(self, rows: Rows) -> tuple[Any, Any]:
        """Enqueues the copy of the rows and of what they need, and writes the lines of new slots.

        Returns the rows and the words on the device.
        """
        writes = self._lines.take_writes()
        words = [write.words for write in writes]
        num_words = sum(map(len, words))
        rows["lines"] = self._lines.of_slot[rows["slot"]]
        rows["grammar"] = NO_LINE
        for row in np.flatnonzero(rows["parameters"]["has_extras"]).tolist():
            extras = self._table.extras[int(rows["slot"][row])]
            if rows["output_position"][row] >= extras.min_tokens:
                rows["lines"]["end_ids"][row] = NO_LINE
            if (grammar := extras.grammar) is not None:
                words.append(grammar[min(int(rows["num_drafted"][row]), len(grammar) - 1)])
                rows["grammar"][row] = num_words
                num_words += len(words[-1])
        pieces = rows, _headers(writes), np.concatenate(words) if words else NO_WORDS
        device_rows, device_headers, device_words = self._copy_to_device(pieces)
        if writes:
            tables = *_with_width(self._lines.lines), *_with_width(self._lines.masks)
            grid = len(writes), 1
            self._launch("write_lines", grid, device_headers, device_words, *tables)
        return device_rows, device_words

    def _copy_to_device(self, pieces: Sequence[Array]) -> list[Any]:
        """Enqueues one copy of all; returns each on the device, as bytes."""
        ends = np.cumsum([piece.nbytes for piece in pieces]).tolist()
        host, device = self._upload.begin(ends[-1])
        for piece, end in zip(pieces, ends, strict=True):
            host[end - piece.nbytes : end] = piece.view(np.uint8)
        device.set(host, self._cp.cuda.get_current_stream())
        self._upload.record()
        starts = [0, *ends[:-1]]
        return [device[start:end] for start, end in zip(starts, ends, strict=True)]

    def _pending(
        self, host: Bytes, device: Any, num_logprobs: Array, width: int
    ) -> PendingSamples:
        """Enqueues the copy of the results.

        num_logprobs  of each row
        width         the largest of them, at least 0
        """
        device.get(stream=self._cp.cuda.get_current_stream(), out=host, blocking=False)
        copied = self._download.record()

        def read() -> Samples:
            copied.synchronize()
            return _samples(host, num_logprobs, width)

        return PendingSamples(read)


def _headers(writes: list[Write]) -> Rows:
    """What the device needs to know of each; their words come first among the words of a step."""
    headers = np.zeros(len(writes), WRITE)
    start = 0
    for header, write in zip(headers, writes, strict=True):
        header["line"], header["is_mask"] = write.line, write.is_mask
        header["start"], header["num_ids"] = start, write.num_ids
        start += len(write.words)
    return headers


def _with_width(array: Any) -> tuple[Any, np.int64]:
    """Two arguments of a kernel: a matrix and the length of its rows."""
    return array, np.int64(array.shape[1])


def _samples(host: Bytes, num_logprobs: Array, width: int) -> Samples:
    """Computes the log-probabilities of a step from the results of its kernels."""
    num_rows = len(num_logprobs)
    results = host[: num_rows * RESULT.itemsize].view(RESULT)
    rest = host[num_rows * RESULT.itemsize :].reshape(2, num_rows, 4 * width)
    all_ids, all_logits = rest[0].view(np.int32), rest[1].view(np.float32)
    logprobs = np.full(num_rows, np.nan, np.float32)
    alternatives = [NO_ALTERNATIVES] * num_rows
    for row in np.flatnonzero((num_logprobs >= 0) & (results["id"] != FAILED)).tolist():
        result, count = results[row], num_logprobs[row]
        # In any order; sorted by logit, the largest first, and then by id
        order = np.lexsort((all_ids[row, :count], -all_logits[row, :count]))
        ids, logits = all_ids[row, order], all_logits[row, order]
        log_sum = math.log(int(result["sum"]) / 2**WEIGHT_BITS)
        x = np.append(logits, result["logit"]) - result["max"]
        values = (x.astype(np.float64) - log_sum).astype(np.float32)
        logprobs[row] = values[-1]
        alternatives[row] = ids, values[:-1]
    return Samples(results["id"].copy(), logprobs, results["rank"].copy(), alternatives)


NO_WORDS = np.zeros(1, np.uint32)
NO_ALTERNATIVES = np.zeros(0, np.int32), np.zeros(0, np.float32)
