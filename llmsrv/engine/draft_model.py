"""A small model that guesses what the large one will draw.

Its plan has the same slots and as many KV blocks, so that the block tables of the one are those of
the other.  It draws with the same numbers at the same positions, and so draws the same where it is
as sure.  It computes a sequence only when it drafts for it, and then all that it has not seen yet.
No answer depends on what it has in its cache.

Source: Leviathan, Kalman & Matias 2023, section 2.
"""

from collections.abc import Callable

import numpy as np

from llmsrv.backend.base import Plan
from llmsrv.backend.sampling.contract import FAILED
from llmsrv.backend.sampling.table import SamplingParameters
from llmsrv.engine.batch import Rows
from llmsrv.engine.batch import build_batch
from llmsrv.engine.kv_cache import KVCache
from llmsrv.engine.sequence import Sequence
from llmsrv.engine.step_costs import StepCosts

# Of what it has not seen yet, in one step: a long prompt does not hold the streams up.
MAX_UNSEEN_ROWS = 256


class DraftModel:
    """costs  of its own steps"""

    def __init__(
        self, plan: Plan, max_rows: int, kv_cache: KVCache, clock: Callable[[], float]
    ) -> None:
        """kv_cache is the large model's; the plan was compiled for the same limits."""
        self.costs = StepCosts()
        self._plan = plan
        self._max_rows = min(max_rows, MAX_UNSEEN_ROWS)
        self._kv_cache = kv_cache
        self._clock = clock

    def enter(self, sequence: Sequence) -> None:
        """The sequence has got a slot."""
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
        sequence.num_seen, sequence.guesses = 0, []

    def draft(self, sequences: list[Sequence], length: int) -> list[list[int]]:
        """So many tokens for each sequence; none where there is too much that it has not seen.  The
        KV cache must have blocks for them."""
        drafts: list[list[int]] = [[] for _ in sequences]
        drawing = self._see(sequences, drafts)
        for i in drawing:
            self._kv_cache.grow(sequences[i].slot, sequences[i].num_tokens + length)
        for _ in range(length - 1):
            rows = [
                Rows(sequences[i], sequences[i].num_tokens + len(drafts[i]) - 1, drafts[i][-1:], 1)
                for i in drawing
            ]
            drawing = self._draw(rows, drawing, drafts)
        for sequence, draft in zip(sequences, drafts, strict=True):
            sequence.guesses = draft[:-1]  # the last one is not computed
        return drafts

    def _see(self, sequences: list[Sequence], drafts: list[list[int]]) -> list[int]:
        """Computes what it has not seen, and draws where that is all; returns who goes on."""
        rows, drawing, left = [], [], self._max_rows
        for i, sequence in enumerate(sequences):
            start = _num_seen(sequence)
            end = min(sequence.num_tokens, start + left)
            is_all = end == sequence.num_tokens
            sequence.num_seen, sequence.guesses = end, []
            if end > start:
                rows.append(Rows(sequence, start, sequence.ids(start, end), int(is_all)))
                left -= end - start
                drawing += [i] * is_all
        return self._draw(rows, drawing, drafts)

    def _draw(self, rows: list[Rows], drawing: list[int], drafts: list[list[int]]) -> list[int]:
        """Computes the rows, and adds a token to the drafts of those that have a logit row."""
        if not rows:
            return []
        start_s = self._clock()
        self._plan.forward(build_batch(rows, self._kv_cache.block_tables))
        going_on = []
        if drawing:
            drawn = [row.sequence for row in rows if row.num_logit_rows]
            slots = np.array([sequence.slot for sequence in drawn], np.int32)
            positions = [
                len(sequence.output_ids) + len(drafts[i])
                for i, sequence in zip(drawing, drawn, strict=True)
            ]
            ids = self._plan.sample(slots, np.array(positions, np.int64)).ids.tolist()
            for i, id in zip(drawing, ids, strict=True):
                if id != FAILED:
                    drafts[i].append(id)
                    going_on.append(i)
        self.costs.note(sum(len(row.ids) for row in rows), self._clock() - start_s)
        return going_on


def _num_seen(sequence: Sequence) -> int:
    """How many of its tokens are computed, without the last one, whose logits are wanted."""
    num_seen, last = sequence.num_seen, sequence.num_tokens - 1
    for guess in sequence.guesses:
        if num_seen >= last or sequence.ids(num_seen, num_seen + 1) != [guess]:
            break
        num_seen += 1
    return min(num_seen, last)
