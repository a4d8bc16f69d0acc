"""Sampling on the CPU backend: all rows of a step in one call of the C library (sample.c).

Mirrors sample.h: change both together.
"""

import ctypes
from collections.abc import Sequence

import numpy as np

from llmsrv.backend.arrays import Array
from llmsrv.backend.base import Limits
from llmsrv.backend.cpu.library import Memory
from llmsrv.backend.cpu.library import address_of
from llmsrv.backend.cpu.library import int32
from llmsrv.backend.cpu.library import pointer
from llmsrv.backend.sampling.samples import FAILED
from llmsrv.backend.sampling.samples import Samples
from llmsrv.backend.sampling.table import Mask
from llmsrv.backend.sampling.table import SamplingParameters
from llmsrv.backend.sampling.table import SamplingTable

ARRAYS = "bias_ids bias_values end_ids allowed grammar in_prompt counts".split()
LENGTHS = "num_biases num_end_ids min_tokens num_grammar_rows".split()

# Extras in sample.h
ADDRESSES = np.dtype(
    [*((name, np.uint64) for name in ARRAYS), *((name, np.int32) for name in LENGTHS)]
)


class SamplingStruct(ctypes.Structure):
    """Sampling in sample.h."""

    _fields_ = [
        ("logits", pointer),
        ("stride", ctypes.c_int64),
        ("vocab_size", int32),
        ("num_rows", int32),
        ("parameters", pointer),
        ("extras", pointer),
        ("slots", pointer),
        ("targets", pointer),
        ("drafts", pointer),
        ("output_positions", pointer),
        ("scratch", pointer),
        ("ids", pointer),
        ("logprobs", pointer),
        ("ranks", pointer),
        ("num_alternatives", int32),
        ("alternative_ids", pointer),
        ("alternative_logprobs", pointer),
    ]


class CPUSamplingTable(SamplingTable):
    """A sampling table that also stores the addresses of its extras for C.

    addresses     [max_slots] of ADDRESSES; never reallocated
    num_logprobs  [max_slots], a copy of that parameter
    """

    def __init__(self, max_slots: int, vocab_size: int) -> None:
        super().__init__(max_slots, vocab_size)
        self.num_logprobs = [-1] * max_slots
        self.addresses = np.zeros(max_slots, ADDRESSES)

    def set(
        self,
        slot: int,
        parameters: SamplingParameters,
        prompt_ids: Sequence[int] = (),
        output_ids: Sequence[int] = (),
    ) -> None:
        super().set(slot, parameters, prompt_ids, output_ids)
        self.num_logprobs[slot] = int(self.parameters[slot]["num_logprobs"])
        self._update_addresses(slot)

    def set_grammar(self, slot: int, mask: Mask | None) -> None:
        super().set_grammar(slot, mask)
        self._update_addresses(slot)

    def _update_addresses(self, slot: int) -> None:
        extras = self.extras.get(slot)
        if extras is None:
            self.addresses[slot] = 0
            return
        arrays = [getattr(extras, name) for name in ARRAYS]
        num_grammar_rows = 0 if extras.grammar is None else len(extras.grammar)
        lengths = len(extras.bias_ids), len(extras.end_ids), extras.min_tokens, num_grammar_rows
        addresses = (0 if array is None else address_of(array) for array in arrays)
        self.addresses[slot] = (*addresses, *lengths)


class Sampler:
    """The arguments of llmsrv_sample, laid out once, and the call itself."""

    def __init__(
        self,
        library: ctypes.CDLL,
        plan: int,
        logits: Array,
        num_threads: int,
        limits: Limits,
        table: CPUSamplingTable,
    ) -> None:
        """plan: the address of PlanStruct; logits: [max_logit_rows, stride], never reallocated."""
        self._call = library.llmsrv_sample
        self._plan = plan
        self._table = table
        max_rows, array = limits.max_logit_rows, Memory(library).array
        size = num_threads * library.llmsrv_sample_scratch_bytes(table.vocab_size)
        integers = array((5, max_rows), np.int32)
        self._slots, self._targets, self._drafts, self.ids, self._ranks = integers
        self._output_positions = array((max_rows,), np.int64)
        self._logprobs = array((max_rows,), np.float32)
        self._kept = scratch, _ = array((size,), np.uint8), logits
        self._struct = SamplingStruct(
            logits=address_of(logits),
            stride=logits.shape[1],
            vocab_size=table.vocab_size,
            parameters=address_of(table.parameters),
            extras=address_of(table.addresses),
            slots=address_of(self._slots),
            targets=address_of(self._targets),
            drafts=address_of(self._drafts),
            output_positions=address_of(self._output_positions),
            scratch=address_of(scratch),
            ids=address_of(self.ids),
            logprobs=address_of(self._logprobs),
            ranks=address_of(self._ranks),
        )
        self._at = ctypes.addressof(self._struct)

    def sample(
        self, slots: Array, output_positions: Array, targets: Array | None, drafts: Array | None
    ) -> Samples:
        """See Plan.sample."""
        num_rows, struct = len(slots), self._struct
        self._slots[:num_rows] = slots
        self._output_positions[:num_rows] = output_positions
        self._targets[:num_rows] = -1 if targets is None else targets
        self._drafts[:num_rows] = -1 if drafts is None else drafts
        struct.num_rows = num_rows
        counts = [self._table.num_logprobs[slot] for slot in slots.tolist()]
        width = max(counts, default=0)
        if width <= 0:
            self._call(self._plan, self._at)
            alternatives = [NO_ALTERNATIVES] * num_rows
        else:
            alternatives = self._call_for_alternatives(counts, width)
        return Samples(
            self.ids[:num_rows].copy(),
            self._logprobs[:num_rows].copy(),
            self._ranks[:num_rows].copy(),
            alternatives,
        )

    def _call_for_alternatives(self, counts: list[int], width: int) -> list[tuple[Array, Array]]:
        """counts: the number of alternatives for each row, at most `width`."""
        ids = np.empty((len(counts), width), np.int32)
        logprobs = np.empty((len(counts), width), np.float32)
        self._struct.num_alternatives = width
        self._struct.alternative_ids = address_of(ids)
        self._struct.alternative_logprobs = address_of(logprobs)
        self._call(self._plan, self._at)
        is_sampled = (self.ids[: len(counts)] != FAILED).tolist()
        return [
            (ids[row, :count], logprobs[row, :count]) if count > 0 and is_sampled[row]
            else NO_ALTERNATIVES
            for row, count in enumerate(counts)
        ]


NO_ALTERNATIVES = np.zeros(0, np.int32), np.zeros(0, np.float32)
