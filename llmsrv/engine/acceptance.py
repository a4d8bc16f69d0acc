"""Acceptance rates of drafted tokens.

The acceptance rate is the probability that the model draws a drafted token, given that it drew all
drafted tokens before it.  Each sequence keeps one rate per draft source, a moving average of what
happened to its own drafts.
"""

from enum import IntEnum

UPDATE_WEIGHT = 0.1  # of one token's outcome in the moving average
DRIFT_WEIGHT = 0.005  # of the initial rate, for each draft that was not tried


class DraftSource(IntEnum):
    """Where a drafted token comes from.

    Prompt lookup has three sources, by how many tokens before the drafted one match an earlier
    place in the sequence.
    """

    SHORT_MATCH = 0
    MEDIUM_MATCH = 1
    LONG_MATCH = 2
    DRAFT_MODEL = 3
    GRAMMAR = 4


# A grammar that leaves only one text still allows more than one tokenization of it.
INITIAL_RATES = {
    DraftSource.SHORT_MATCH: 0.4,
    DraftSource.MEDIUM_MATCH: 0.65,
    DraftSource.LONG_MATCH: 0.85,
    DraftSource.DRAFT_MODEL: 0.5,
    DraftSource.GRAMMAR: 0.95,
}
MEDIUM_MATCH_TOKENS, LONG_MATCH_TOKENS = 4, 8


def source_of_match(match_length: int) -> DraftSource:
    """The source of a token that prompt lookup drafts after a match of match_length tokens."""
    if match_length < MEDIUM_MATCH_TOKENS:
        return DraftSource.SHORT_MATCH
    is_medium = match_length < LONG_MATCH_TOKENS
    return DraftSource.MEDIUM_MATCH if is_medium else DraftSource.LONG_MATCH


class AcceptanceRates:
    """The rates of one sequence."""

    def __init__(self) -> None:
        self._rates = dict(INITIAL_RATES)

    def of(self, source: DraftSource) -> float:
        return self._rates[source]

    def record(self, source: DraftSource, is_accepted: bool) -> None:
        self._rates[source] += UPDATE_WEIGHT * (is_accepted - self._rates[source])

    def drift_to_initial(self, source: DraftSource) -> None:
        """Records that a draft starting with this source was not tried.

        Without this, a source with a low rate would never be tried again, although texts change.
        """
        self._rates[source] += DRIFT_WEIGHT * (INITIAL_RATES[source] - self._rates[source])
