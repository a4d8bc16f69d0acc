"""Speculative decoding: tokens that are likely to come are computed beside the one that is known,
and those that are drawn indeed cost no steps of their own.

The model itself draws at each drafted position, with that position's own number, and a draft is
kept as long as it is what was drawn (backend/base.py, Plan.sample).  So the output is that of plain
decoding, and a draft costs time at most.

Drafts come from what the sequence has said before (lookup.py) or from a small model
(draft_model.py), and where a grammar leaves only one way to go on, from there.  How long they are
follows from what steps cost by their rows, and from how likely their tokens are to be kept
(hope.py); where drafts do not pay, there are none.
"""

from collections import Counter
from itertools import accumulate
from operator import mul
from typing import NamedTuple

from llmsrv.engine.draft_model import DraftModel
from llmsrv.engine.hope import Ground
from llmsrv.engine.hope import ground_of
from llmsrv.engine.sequence import Sequence
from llmsrv.engine.step_costs import StepCosts

MAX_DRAFT = 16


class Draft(NamedTuple):
    """Tokens, and what each is drafted for."""

    ids: list[int]
    grounds: list[Ground]


class Speculation:
    """num_drafts, num_draft_tokens, num_accepted_tokens  since the engine started"""

    def __init__(
        self,
        costs: StepCosts,
        looks_up: bool,
        model: DraftModel | None = None,
        draft_length: int = 0,
    ) -> None:
        """costs: of the large model's steps; draft_length: of all drafts, 0 for what pays."""
        self._costs = costs
        self._looks_up = looks_up
        self._model = model
        self._draft_length = draft_length
        self.num_drafts = 0
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0

    def enter(self, sequence: Sequence) -> None:
        """The sequence has got a slot."""
        if self._model is not None:
            self._model.enter(sequence)

    def draft(self, sequences: list[Sequence], most: int) -> list[list[int]]:
        """A draft for each of the sequences, which all are in decode, of so many tokens together at
        most; an empty one where none pays."""
        longest = min(most, self._draft_length or MAX_DRAFT)
        drafts = [self._propose(sequence, longest) for sequence in sequences]
        if not any(draft.ids for draft in drafts):
            return self._ask(sequences, most)
        lengths = self._lengths(sequences, drafts, most)
        for sequence, draft, length in zip(sequences, drafts, lengths, strict=True):
            sequence.grounds = draft.grounds
            if draft.ids and not length:
                sequence.hopes.forgive(draft.grounds[0])
        return [draft.ids[:length] for draft, length in zip(drafts, lengths, strict=True)]

    def note(self, sequence: Sequence, num_drafted: int, num_kept: int) -> None:
        """What became of a draft: so many were kept, and the next one, if any, was not."""
        self.num_drafts += 1
        self.num_draft_tokens += num_drafted
        self.num_accepted_tokens += num_kept
        for i, ground in enumerate(sequence.grounds[: min(num_kept + 1, num_drafted)]):
            sequence.hopes.note(ground, i < num_kept)

    def _propose(self, sequence: Sequence, most: int) -> Draft:
        most = min(most, _num_left(sequence))
        if most > 0 and sequence.grammar is not None:
            if forced := sequence.grammar.forced():
                ids = forced[:most]
                return Draft(ids, [Ground.GRAMMAR] * len(ids))
        if most <= 0 or not self._looks_up:
            return Draft([], [])
        lookup = sequence.lookup
        lookup.extend(sequence.ids(lookup.num_tokens, sequence.num_tokens))
        ids, num_same = lookup.draft(most)
        return Draft(ids, [ground_of(num_same + i) for i in range(len(ids))])

    def _ask(self, sequences: list[Sequence], most: int) -> list[list[int]]:
        """Drafts of the small model, of one length for all of them."""
        if self._model is None or most < len(sequences) or not sequences:
            return [[] for _ in sequences]
        pays = self._draft_length or self._length_that_pays(self._model, sequences)
        length = min(pays, most // len(sequences), *map(_num_left, sequences))
        if not length:
            for sequence in sequences:
                sequence.hopes.forgive(Ground.MODEL)
            return [[] for _ in sequences]
        for sequence in sequences:
            sequence.grounds = [Ground.MODEL] * length
        return self._model.draft(sequences, length)

    def _length_that_pays(self, model: DraftModel, sequences: list[Sequence]) -> int:
        num_rows = len(sequences)
        num_tokens: float = num_rows
        best, best_cost_s = 0, self._costs.of(num_rows) / num_tokens
        for length in range(1, MAX_DRAFT + 1):
            num_tokens += sum(sequence.hopes.of(Ground.MODEL) ** length for sequence in sequences)
            drafting_s = length * model.costs.of(num_rows)
            cost_s = (self._costs.of(num_rows * (1 + length)) + drafting_s) / num_tokens
            if cost_s < best_cost_s:
                best, best_cost_s = length, cost_s
        return best

    def _lengths(self, sequences: list[Sequence], drafts: list[Draft], most: int) -> list[int]:
        """How much of each draft makes the most tokens a second, all sequences together."""
        hopes = []
        for i, (sequence, draft) in enumerate(zip(sequences, drafts, strict=True)):
            hopes += [(hope, i) for hope in accumulate(map(sequence.hopes.of, draft.grounds), mul)]
        hopes = sorted(hopes, reverse=True)[:most]
        if not self._draft_length:
            hopes = hopes[: self._num_that_pay([hope for hope, _ in hopes], len(drafts))]
        counts = Counter(i for _, i in hopes)
        return [counts[i] for i in range(len(drafts))]

    def _num_that_pay(self, hopes: list[float], num_rows: int) -> int:
        """Of the drafted tokens, the most likely ones first; num_rows are there without them."""
        num_tokens: float = num_rows
        best, best_cost_s = 0, self._costs.of(num_rows) / num_tokens
        for i, hope in enumerate(hopes):
            num_tokens += hope
            cost_s = self._costs.of(num_rows + i + 1) / num_tokens
            if cost_s < best_cost_s:
                best, best_cost_s = i + 1, cost_s
        return best


def _num_left(sequence: Sequence) -> int:
    """How much of a draft may be kept: one token is drawn anyway, and behind the last one none."""
    return sequence.max_tokens - len(sequence.output_ids) - 1
