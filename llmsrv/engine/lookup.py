"""Prompt lookup: drafts the tokens that followed the last time the latest n-gram occurred.

Source: Saxena 2023, "Prompt Lookup Decoding".
"""

from llmsrv.engine.acceptance import LONG_MATCH_TOKENS

NGRAM_LENGTHS = (4, 2)  # tried in this order: a longer match is a better predictor


class Lookup:
    """The n-grams of one sequence."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}  # n-gram -> position after its last occurrence

    @property
    def num_tokens(self) -> int:
        return len(self._ids)

    def extend(self, ids: list[int]) -> None:
        for id in ids:
            for length in NGRAM_LENGTHS:
                self._next[tuple(self._ids[-length:])] = len(self._ids)
            self._ids.append(id)

    def draft(self, num_tokens: int) -> tuple[list[int], int]:
        """Returns num_tokens drafted tokens and the length of the match before them.

        The length is counted up to LONG_MATCH_TOKENS.  The draft is empty when the latest n-grams
        have not occurred before.
        """
        for length in NGRAM_LENGTHS:
            start = self._next.get(tuple(self._ids[-length:]))
            if start is not None:
                return self._continuation(start, num_tokens), self._match_length(start)
        return [], 0

    def _continuation(self, start: int, num_tokens: int) -> list[int]:
        draft = self._ids[start : start + num_tokens]
        while len(draft) < num_tokens:  # the match overlaps the end: the text is periodic
            draft += draft[: num_tokens - len(draft)]
        return draft

    def _match_length(self, start: int) -> int:
        count, limit = 0, min(start, LONG_MATCH_TOKENS)
        while count < limit and self._ids[start - 1 - count] == self._ids[-1 - count]:
            count += 1
        return count
