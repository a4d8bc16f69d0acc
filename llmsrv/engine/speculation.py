"""Speculative decoding: a step computes likely next tokens together with the known one.

The model itself samples at each drafted position, with that position's own random number.  A draft
is accepted as long as it equals what was sampled (backend/base.py, Plan.sample).  So the output is
that of plain decoding, each accepted token saves a step, and a rejected one costs only time.

Drafts come from earlier text of the sequence (lookup.py), from a small model (draft_model.py), or
from a grammar that allows only one continuation.  The length of a draft follows from the cost of a
step by its number of rows (step_costs.py) and from the acceptance rates (acceptance.py).  A draft
that would not pay is not made.
"""

from collections import Counter
from itertools import accumulate
from operator import mul
from typing import NamedTuple

from llmsrv.engine.acceptance import DraftSource
from llmsrv.engine.acceptance import source_of_match
from llmsrv.engine.draft_model import DraftModel
from llmsrv.engine.sequence import Sequence
from llmsrv.engine.step_costs import StepCosts

MAX_DRAFT_TOKENS = 16


class Draft(NamedTuple):
    """Drafted tokens and the source of each."""

    ids: list[int]
    sources: list[DraftSource]


class Speculation:
    """num_drafts, num_draft_tokens, num_accepted_tokens  since the engine started"""

    def __init__(
        self,
        costs: StepCosts,
        uses_prompt_lookup: bool,
        model: DraftModel | None = None,
        draft_length: int = 0,
    ) -> None:
        """costs         of the target model's steps
        draft_length  tokens in every draft; 0: the length that pays best
        """
        self._costs = costs
        self._uses_prompt_lookup = uses_prompt_lookup
        self._model = model
        self._draft_length = draft_length
        self.num_drafts = 0
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0

    @property
    def is_enabled(self) -> bool:
        """Whether there may be drafts that no grammar forces."""
        return self._uses_prompt_lookup or self._model is not None

    def start(self, sequence: Sequence) -> None:
        """Prepares a sequence that has just been given a slot."""
        if self._model is not None:
            self._model.start(sequence)

    def draft(self, sequences: list[Sequence], budget: int) -> list[list[int]]:
        """A draft for each sequence, empty where none pays; at most `budget` tokens in total.

        All sequences must be in decode.
        """
        max_length = min(budget, self._draft_length or MAX_DRAFT_TOKENS)
        drafts = [self._propose(sequence, max_length) for sequence in sequences]
        if not any(draft.ids for draft in drafts):
            return self._draft_with_model(sequences, budget)
        lengths = self._best_lengths(sequences, drafts, budget)
        for sequence, draft, length in zip(sequences, drafts, lengths, strict=True):
            sequence.draft_sources = draft.sources
            if draft.ids and not length:
                sequence.acceptance_rates.drift_to_initial(draft.sources[0])
        return [draft.ids[:length] for draft, length in zip(drafts, lengths, strict=True)]

    def record(self, sequence: Sequence, num_drafted: int, num_accepted: int) -> None:
        """Records the outcome of the sequence's last draft."""
        self.num_drafts += 1
        self.num_draft_tokens += num_drafted
        self.num_accepted_tokens += num_accepted
        # Tokens after the first rejected one were not tested.
        for i, source in enumerate(sequence.draft_sources[: min(num_accepted + 1, num_drafted)]):
            sequence.acceptance_rates.record(source, i < num_accepted)

    def _propose(self, sequence: Sequence, max_length: int) -> Draft:
        """A draft from the grammar or by prompt lookup."""
        max_length = min(max_length, _max_draft_length(sequence))
        if max_length > 0 and sequence.grammar is not None:
            if forced := sequence.grammar.forced():
                ids = forced[:max_length]
                return Draft(ids, [DraftSource.GRAMMAR] * len(ids))
        if max_length <= 0 or not self._uses_prompt_lookup:
            return Draft([], [])
        lookup = sequence.lookup
        lookup.extend(sequence.ids(lookup.num_tokens, sequence.num_tokens))
        ids, match_length = lookup.draft(max_length)
        return Draft(ids, [source_of_match(match_length + i) for i in range(len(ids))])

    def _draft_with_model(self, sequences: list[Sequence], budget: int) -> list[list[int]]:
        """Drafts of the draft model, all of the same length."""
        if self._model is None or budget < len(sequences) or not sequences:
            return [[] for _ in sequences]
        best = self._draft_length or self._best_model_length(self._model, sequences)
        length = min(best, budget // len(sequences), *map(_max_draft_length, sequences))
        if not length:
            for sequence in sequences:
                sequence.acceptance_rates.drift_to_initial(DraftSource.DRAFT_MODEL)
            return [[] for _ in sequences]
        for sequence in sequences:
            sequence.draft_sources = [DraftSource.DRAFT_MODEL] * length
        return self._model.draft(sequences, length)

    def _best_model_length(self, model: DraftModel, sequences: list[Sequence]) -> int:
        """The draft length with the lowest expected time per token."""
        num_rows = len(sequences)
        rates = [each.acceptance_rates.of(DraftSource.DRAFT_MODEL) for each in sequences]
        num_tokens: float = num_rows
        best, best_cost_s = 0, self._costs.of(num_rows) / num_tokens
        for length in range(1, MAX_DRAFT_TOKENS + 1):
            num_tokens += sum(rate**length for rate in rates)
            drafting_s = length * model.costs.of(num_rows)
            cost_s = (self._costs.of(num_rows * (1 + length)) + drafting_s) / num_tokens
            if cost_s < best_cost_s:
                best, best_cost_s = length, cost_s
        return best

    def _best_lengths(
        self, sequences: list[Sequence], drafts: list[Draft], budget: int
    ) -> list[int]:
        """How much of each draft to keep for the lowest expected time per token over all of them.

        A token is accepted with the product of the rates up to it, so the most likely tokens of all
        drafts together are always leading parts of the drafts.
        """
        candidates = []  # probability of being accepted, index of the draft
        for i, (sequence, draft) in enumerate(zip(sequences, drafts, strict=True)):
            rates = map(sequence.acceptance_rates.of, draft.sources)
            candidates += [(probability, i) for probability in accumulate(rates, mul)]
        candidates = sorted(candidates, reverse=True)[:budget]
        if not self._draft_length:
            probabilities = [probability for probability, _ in candidates]
            candidates = candidates[: self._best_num_tokens(probabilities, len(drafts))]
        counts = Counter(i for _, i in candidates)
        return [counts[i] for i in range(len(drafts))]

    def _best_num_tokens(self, probabilities: list[float], num_rows: int) -> int:
        """How many of the drafted tokens to keep, the most likely ones first.

        num_rows  rows of the step without drafts
        """
        num_tokens: float = num_rows
        best, best_cost_s = 0, self._costs.of(num_rows) / num_tokens
        for i, probability in enumerate(probabilities):
            num_tokens += probability
            cost_s = self._costs.of(num_rows + i + 1) / num_tokens
            if cost_s < best_cost_s:
                best, best_cost_s = i + 1, cost_s
        return best


def _max_draft_length(sequence: Sequence) -> int:
    """Drafted tokens that could still be accepted: each step samples one token without a draft."""
    return sequence.max_tokens - len(sequence.output_ids) - 1
