"""Speculative decoding: tokens that are likely to come are computed beside the one that is known,
and those that are drawn indeed cost no steps of their own.

The model itself draws at each drafted position, with that position's own number, and a draft is
kept as long as it is what was drawn (backend/base.py, Plan.sample).  So the output is that of plain
decoding, and a draft costs time at most.

Drafts come from what the sequence has said before (lookup.py), and where its grammar leaves only
one way to go on, from there.  How long they are follows from what steps cost by their rows, and
from how many drafted tokens of the sequence were kept so far; where drafts do not pay, there are
none.
"""

from collections import Counter
from typing import NamedTuple

from llmsrv.engine.sequence import Sequence
from llmsrv.engine.step_costs import StepCosts

MAX_DRAFT = 16
FORCED_HOPE = 0.95  # a grammar leaves one text, which tokens may still spell in several ways


class Draft(NamedTuple):
    ids: list[int]
    hope: float  # that a token is kept, when those before it are


class Speculation:
    """num_drafts, num_draft_tokens, num_accepted_tokens  since the engine started"""

    def __init__(self, costs: StepCosts, looks_up: bool, draft_length: int = 0) -> None:
        """draft_length: of all drafts; 0: what pays."""
        self._costs = costs
        self._looks_up = looks_up
        self._draft_length = draft_length
        self.num_drafts = 0
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0

    def draft(self, sequences: list[Sequence], most: int) -> list[list[int]]:
        """A draft for each of the sequences, which all are in decode, of so many tokens together at
        most; an empty one where none pays."""
        longest = min(most, self._draft_length or MAX_DRAFT)
        drafts = [self._propose(sequence, longest) for sequence in sequences]
        if not any(draft.ids for draft in drafts):
            return [[] for _ in drafts]
        lengths = self._lengths(drafts, most)
        for i, sequence in enumerate(sequences):
            if drafts[i].ids and not lengths[i]:
                sequence.lookup.forgive()
        return [draft.ids[: lengths[i]] for i, draft in enumerate(drafts)]

    def note(self, sequence: Sequence, num_drafted: int, num_kept: int) -> None:
        """What became of a draft."""
        self.num_drafts += 1
        self.num_draft_tokens += num_drafted
        self.num_accepted_tokens += num_kept
        sequence.lookup.note(num_drafted, num_kept)

    def _propose(self, sequence: Sequence, most: int) -> Draft:
        # One token is drawn anyway, and behind the last one nothing.
        most = min(most, sequence.max_tokens - len(sequence.output_ids) - 1)
        if most > 0 and sequence.grammar is not None:
            if forced := sequence.grammar.forced():
                return Draft(forced[:most], FORCED_HOPE)
        if most <= 0 or not self._looks_up:
            return Draft([], 0.0)
        lookup = sequence.lookup
        lookup.extend(sequence.ids(lookup.num_tokens, sequence.num_tokens))
        return Draft(lookup.draft(most), lookup.hope)

    def _lengths(self, drafts: list[Draft], most: int) -> Counter[int]:
        """How much of each draft makes the most tokens a second, all sequences together."""
        hopes = [
            (draft.hope ** (j + 1), i)
            for i, draft in enumerate(drafts)
            for j in range(len(draft.ids))
        ]
        hopes = sorted(hopes, reverse=True)[:most]
        if not self._draft_length:
            hopes = hopes[: self._num_that_pay([hope for hope, _ in hopes], len(drafts))]
        return Counter(i for _, i in hopes)

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
