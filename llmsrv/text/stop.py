"""Finds stop strings in text that arrives in pieces, and says how much text can be sent already.

The first stop string to be complete ends the text, at the character where it begins.  If several
are complete at once, the one that begins first wins.  So the result does not depend on the pieces.

Each stop string is matched with the automaton of Knuth, Morris and Pratt.  Its state is the length
of the longest prefix of the stop string that the text currently ends with.  Those characters are
withheld, since the stop string may have begun there; all text before them is safe to send.  Time is
linear in the text for each stop string.
"""

from collections.abc import Sequence
from functools import lru_cache


class StopMatcher:
    """Watches the text of one choice.  After a match, all later text is dropped.

    matched  the stop string that ended the text; None before
    """

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        """stops: not empty strings; may be an empty list.  include_stop: the text includes the stop
        string that ends it."""
        assert "" not in stops
        self._include_stop = include_stop
        self._patterns = [_Pattern(stop) for stop in stops]
        self._first_characters = frozenset(stop[0] for stop in stops)
        self._withheld = ""
        self.matched: str | None = None

    @property
    def num_withheld(self) -> int:
        """Characters that arrived and are neither sent nor dropped yet."""
        return len(self._withheld)

    def push(self, text: str) -> tuple[str, bool]:
        """Takes the next text; returns what can be sent now, and whether a stop string matched.

        On a match, returns all text before the stop string, plus the stop string itself if
        include_stop is set."""
        if self.matched is not None:
            return "", True
        if not self._withheld and self._first_characters.isdisjoint(text):
            return text, False
        pending = self._withheld + text
        for position, character in enumerate(text, start=len(self._withheld) + 1):
            matched = [pattern.stop for pattern in self._patterns if pattern.step(character)]
            if matched:
                self.matched = max(matched, key=len)
                self._withheld = ""
                num_dropped = 0 if self._include_stop else len(self.matched)
                return pending[: position - num_dropped], True
        num_safe = len(pending) - max(pattern.state for pattern in self._patterns)
        self._withheld = pending[num_safe:]
        return pending[:num_safe], False

    def flush(self) -> str:
        """At the end of the text: returns the withheld text; no stop string can match now."""
        withheld, self._withheld = self._withheld, ""
        return withheld


class _Pattern:
    """One stop string, and how many of its first characters the text so far ends with."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.state = 0
        self._failure = _failure_function(stop)

    def step(self, character: str) -> bool:
        """Takes one character; returns True if it completes the stop string."""
        while self.state and self.stop[self.state] != character:
            self.state = self._failure[self.state - 1]
        if self.stop[self.state] == character:
            self.state += 1
        return self.state == len(self.stop)


@lru_cache(maxsize=256)  # a request's choices have the same stop strings
def _failure_function(stop: str) -> list[int]:
    """For each prefix, the length of its longest proper suffix that is also a prefix of `stop`.
    Source: Knuth, Morris and Pratt 1977."""
    lengths = [0]
    length = 0
    for character in stop[1:]:
        while length and stop[length] != character:
            length = lengths[length - 1]
        if stop[length] == character:
            length += 1
        lengths.append(length)
    return lengths
