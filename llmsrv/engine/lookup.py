"""Prompt look-up: what has followed the last tokens of a sequence when they were there before.

Source: Saxena 2023, "Prompt Lookup Decoding".
"""

from llmsrv.engine.hope import MANY

NGRAMS = (4, 2)  # tokens that have to be the same; the longer ones tell more


class Lookup:
    """The runs of so many tokens of one sequence."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}  # where the last one of each went on

    @property
    def num_tokens(self) -> int:
        return len(self._ids)

    def extend(self, ids: list[int]) -> None:
        for id in ids:
            for length in NGRAMS:
                self._next[tuple(self._ids[-length:])] = len(self._ids)
            self._ids.append(id)

    def draft(self, most: int) -> tuple[list[int], int]:
        """What may come next, and how many tokens before it are the same as then, of which MANY are
        counted; nothing when the last tokens were never there before."""
        for length in NGRAMS:
            start = self._next.get(tuple(self._ids[-length:]))
            if start is not None:
                return self._from(start, most), self._num_same(start)
        return [], 0

    def _from(self, start: int, most: int) -> list[int]:
        draft = self._ids[start : start + most]
        while len(draft) < most:  # they overlap: the text repeats itself
            draft += draft[: most - len(draft)]
        return draft

    def _num_same(self, start: int) -> int:
        count = 0
        while count < min(start, MANY) and self._ids[start - 1 - count] == self._ids[-1 - count]:
            count += 1
        return count
