"""The sampling table, and its lines on the device: masks, biases and counts by slot.

The parameters of a row and its grammar's mask travel with every step.  What is too long for that
stays on the device in lines, and is written there in the first step after SamplingTable.set, in
stream order.  So each step uses what the host had written when the step was enqueued.  From then on
only the device counts output ids; Extras.counts stays as it was set.
"""

from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llmsrv.backend.arrays import Array
from llmsrv.backend.cuda.sampling_layout import LINES
from llmsrv.backend.cuda.sampling_layout import NO_LINE
from llmsrv.backend.sampling.table import Ids
from llmsrv.backend.sampling.table import Mask
from llmsrv.backend.sampling.table import mask_of
from llmsrv.backend.sampling.table import SamplingParameters
from llmsrv.backend.sampling.table import SamplingTable

LINE_UNIT = 32  # lines are padded to a multiple of it
FIRST_LINES = 4
MASKS_PER_SLOT = 3

Words = npt.NDArray[np.uint32]


class CUDASamplingTable(SamplingTable):
    """A sampling table that remembers which slots the device does not know yet.

    unsent  the slots that were set since the last step
    """

    def __init__(self, max_slots: int, vocab_size: int) -> None:
        super().__init__(max_slots, vocab_size)
        self.unsent: set[int] = set()

    def set(
        self,
        slot: int,
        parameters: SamplingParameters,
        prompt_ids: Sequence[int] = (),
        output_ids: Sequence[int] = (),
    ) -> None:
        super().set(slot, parameters, prompt_ids, output_ids)
        self.unsent.add(slot)


class Write(NamedTuple):
    """A line to write.

    words  the whole mask; or the ids whose word is not 0, and then these words
    """

    line: int
    is_mask: bool
    words: Words

    @property
    def num_ids(self) -> int:
        return 0 if self.is_mask else len(self.words) // 2


class DeviceLines:
    """The lines on the device.

    masks    [3 * max_slots, mask_words] uint32, a bit for each id
    lines    [lines, line_words] uint32, a word for each id; it grows, so that only slots with a
             bias or penalties take this much memory
    of_slot  [max_slots] of LINES: the lines of each slot
    """

    def __init__(self, cp: Any, table: CUDASamplingTable) -> None:
        max_slots, mask_words = len(table.parameters), -(-table.vocab_size // 32)
        self._cp = cp
        self._table = table
        self._unused: list[int] = []
        self.masks = cp.zeros((MASKS_PER_SLOT * max_slots, mask_words), np.uint32)
        self.lines = cp.zeros((0, -(-table.vocab_size // LINE_UNIT) * LINE_UNIT), np.uint32)
        self.of_slot = np.full(max_slots, NO_LINE, LINES)

    def take_writes(self) -> list[Write]:
        """What must be written before the next step; the table has nothing unsent afterwards."""
        writes = [write for slot in sorted(self._table.unsent) for write in self._set(slot)]
        self._table.unsent.clear()
        return writes

    def counts(self, slot: int) -> Ids | None:
        """A copy of the slot's counts as the last step left them, for tests; None without any."""
        line = int(self.of_slot[slot]["counts"])
        if line == NO_LINE:
            return None
        counts: Ids = self.lines[line].get().view(np.int32)[: self._table.vocab_size]
        return counts

    def _set(self, slot: int) -> list[Write]:
        lines, extras = self.of_slot[slot], self._table.extras.get(slot)
        self._unused += [line for line in (lines["bias"], lines["counts"]) if line != NO_LINE]
        self.of_slot[slot] = NO_LINE
        if extras is None:
            return []
        masks = {"allowed": extras.allowed}
        if extras.min_tokens > 0:
            masks["end_ids"] = ~mask_of(extras.end_ids.tolist(), self._table.vocab_size)
        words: dict[str, tuple[Array, Array]] = {}
        if len(extras.bias_ids):
            words["bias"] = extras.bias_ids, extras.bias_values
        if extras.counts is not None and extras.in_prompt is not None:
            counted = np.flatnonzero(extras.counts).astype(np.int32)
            words["counts"] = counted, extras.counts[counted]
            masks["in_prompt"] = _packed(extras.in_prompt)
        writes = []
        for place, (name, mask) in enumerate(masks.items()):
            if mask is not None:
                lines[name] = MASKS_PER_SLOT * slot + place
                writes.append(Write(int(lines[name]), True, mask))
        for name, (ids, values) in words.items():
            lines[name] = self._unused_line()
            both = np.concatenate([ids.view(np.uint32), values.view(np.uint32)])
            writes.append(Write(int(lines[name]), False, both))
        return writes

    def _unused_line(self) -> int:
        if not self._unused:
            count, width = self.lines.shape
            grown = self._cp.zeros((max(FIRST_LINES, 2 * count), width), np.uint32)
            if count:
                self._cp.copyto(grown[:count], self.lines)
            self._unused = list(range(count, len(grown)))
            self.lines = grown
        return self._unused.pop()


def _packed(is_set: npt.NDArray[np.bool_]) -> Mask:
    """A mask, as mask_of makes it."""
    bits: Array = np.zeros(-(-len(is_set) // 32) * 32, np.bool_)
    bits[: len(is_set)] = is_set
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32, copy=False)
