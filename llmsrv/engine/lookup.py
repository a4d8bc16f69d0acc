"""Prompt look-up: what has followed the last tokens of a sequence when they were there before.

Source: Saxena 2023, "Prompt Lookup Decoding".
"""

NGRAM = 3  # tokens that have to be the same
# The share of drafted tokens that are kept: what is hoped for at first, and how fast it changes.
FIRST_HOPE = 0.5
WEIGHT = 0.1
FORGIVENESS = 0.005


class Lookup:
    """The runs of NGRAM tokens of one sequence, and how well drafts have done there so far.

    hope  the share of drafted tokens that will be kept
    """

    def __init__(self) -> None:
        self.hope = FIRST_HOPE
        self._ids: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}  # where the last one of each went on

    @property
    def num_tokens(self) -> int:
        return len(self._ids)

    def extend(self, ids: list[int]) -> None:
        for id in ids:
            self._next[tuple(self._ids[-NGRAM:])] = len(self._ids)
            self._ids.append(id)

    def draft(self, most: int) -> list[int]:
        """What may come next; empty when the last tokens were never there before."""
        start = self._next.get(tuple(self._ids[-NGRAM:]))
        if start is None:
            return []
        draft = self._ids[start : start + most]
        while len(draft) < most:  # they overlap: the text repeats itself
            draft += draft[: most - len(draft)]
        return draft

    def note(self, num_drafted: int, num_kept: int) -> None:
        """The fate of a draft: so many were kept, and the next one, if there was one, was not."""
        for is_kept in [1.0] * num_kept + [0.0] * (num_kept < num_drafted):
            self.hope += WEIGHT * (is_kept - self.hope)

    def forgive(self) -> None:
        """A draft was not tried: in time the next one will be, for text changes."""
        self.hope += FORGIVENESS * (FIRST_HOPE - self.hope)
