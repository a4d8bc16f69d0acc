"""Drafts tokens with a small model.

The draft model's plan has the same slots and the same number of KV blocks as the target model's, so
both use the same block tables.  It draws with the same random numbers at the same positions, so the
two agree wherever the draft model's distribution is close enough.  A sequence is computed only when
a draft is wanted, and then all of its tokens that the draft model has not computed yet.  The output
never depends on the content of the draft model's cache.

Source: Leviathan, Kalman & Matias 2023, section 2.
"""

from collections.abc import Callable

import numpy as np

from llmsrv.backend.base import Plan
from llmsrv.backend.sampling.samples import FAILED
from llmsrv.backend.sampling.table import SamplingParameters
from llmsrv.engine.batch import Rows
from llmsrv.engine.batch import build_batch
from llmsrv.engine.kv_cache import KVCache
from llmsrv.engine.sequence import Sequence
from llmsrv.engine.step_costs import StepCosts

# Rows that one step may compute to catch up, so that a long prompt does not stall the streams.
MAX_CATCH_UP_ROWS = 256


class DraftModel:
    """costs  of the draft model's own steps"""

    def __init__(
        self, plan: Plan, max_rows: int, kv_cache: KVCache, clock: Callable[[], float]
    ) -> None:
        """kv_cache is the target model's; the plan must be compiled for the same limits."""
        self.costs = StepCosts()
        self._plan = plan
        self._max_rows = min(max_rows, MAX_CATCH_UP_ROWS)
        self._kv_cache = kv_cache
        self._clock = clock

    def start(self, sequence: Sequence) -> None:
        """Prepares a sequence that has just been given a slot."""
        sampling = sequence.submit.sampling
        parameters = SamplingParameters(
            seed=sampling.seed,
            choice=sequence.choice,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
        )
        self._plan.sampling.set(sequence.slot, parameters)
        sequence.num_draft_computed, sequence.computed_draft_ids = 0, []

    def draft(self, sequences: list[Sequence], length: int) -> list[list[int]]:
        """Drafts `length` tokens for each sequence.

        A draft is empty while the draft model is still catching up with the sequence, and ends
        early at a row that cannot be sampled.  The KV cache must have free blocks for the drafts.
        """
        drafts: list[list[int]] = [[] for _ in sequences]
        drawing = self._catch_up(sequences, drafts)
        for i in drawing:
            self._kv_cache.allocate(sequences[i].slot, sequences[i].num_tokens + length)
        for _ in range(length - 1):
            rows = [
                Rows(sequences[i], sequences[i].num_tokens + len(drafts[i]) - 1, drafts[i][-1:], 1)
                for i in drawing
            ]
            drawing = self._draw(rows, drawing, drafts)
        for sequence, draft in zip(sequences, drafts, strict=True):
            sequence.computed_draft_ids = draft[:-1]  # the last one is not computed
        return drafts

    def _catch_up(self, sequences: list[Sequence], drafts: list[list[int]]) -> list[int]:
        """Computes missing tokens, and draws the first draft token of each complete sequence.

        Returns the indices of the sequences that were drawn.
        """
        rows, drawing, budget = [], [], self._max_rows
        for i, sequence in enumerate(sequences):
            start = _num_computed(sequence)
            end = min(sequence.num_tokens, start + budget)
            is_complete = end == sequence.num_tokens
            sequence.num_draft_computed, sequence.computed_draft_ids = end, []
            if end > start:
                rows.append(Rows(sequence, start, sequence.ids(start, end), int(is_complete)))
                budget -= end - start
                drawing += [i] * is_complete
        return self._draw(rows, drawing, drafts)

    def _draw(self, rows: list[Rows], drawing: list[int], drafts: list[list[int]]) -> list[int]:
        """Computes the rows and appends a token to the draft of each row that is a logit row.

        drawing  indices of the drafts of the logit rows, in order
        Returns those of `drawing` that could be sampled.
        """
        if not rows:
            return []
        start_s = self._clock()
        self._plan.forward(build_batch(rows, self._kv_cache.block_tables))
        drawn = []
        if drawing:
            sampled = [row.sequence for row in rows if row.num_logit_rows]
            slots = np.array([sequence.slot for sequence in sampled], np.int32)
            positions = [
                len(sequence.output_ids) + len(drafts[i])
                for i, sequence in zip(drawing, sampled, strict=True)
            ]
            ids = self._plan.sample(slots, np.array(positions, np.int64)).ids.tolist()
            for i, id in zip(drawing, ids, strict=True):
                if id != FAILED:
                    drafts[i].append(id)
                    drawn.append(i)
        self.costs.record(sum(len(row.ids) for row in rows), self._clock() - start_s)
        return drawn


def _num_computed(sequence: Sequence) -> int:
    """Leading tokens that the draft model has computed, including drafts that were accepted.

    The last token never counts: its logits are wanted.
    """
    num_computed, last = sequence.num_draft_computed, sequence.num_tokens - 1
    for id in sequence.computed_draft_ids:
        if num_computed >= last or sequence.ids(num_computed, num_computed + 1) != [id]:
            break
        num_computed += 1
    return min(num_computed, last)
