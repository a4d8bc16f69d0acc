"""Prompt look-up: what has followed the last tokens of a sequence when they were there before.

Source: Saxena 2023, "Prompt Lookup Decoding".
"""

NGRAM = 3  # tokens that have to be the same


class Lookup:
    """The runs of NGRAM tokens of one sequence."""

    def __init__(self) -> None:
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
