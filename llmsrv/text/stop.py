"""Finds stop strings in text that arrives in pieces, and says how much of it may be sent already.

The first stop string to be complete ends the text, at the character where it begins; of several
complete at once, the one that begins first.  So the answer does not depend on the pieces.

Each stop string is followed with the automaton of Knuth, Morris and Pratt: its state is how many of
its characters the text ends with just now.  Those characters are withheld, since they may turn out
to be its beginning; all before them is safe.  The time is linear in the text for each stop string.
"""

from collections.abc import Sequence


class StopMatcher:
    """Watches the text of one choice.  Once a stop string matched, everything later is dropped.

    matched  the stop string that ended the text; None before
    """

    def __init__(self, stops: Sequence[str], keeps_match: bool = False) -> None:
        """stops: none of them empty; there may be none at all.  keeps_match: the stop string that
        ends the text is part of it."""
        assert "" not in stops
        self._keeps_match = keeps_match
        self._patterns = [_Pattern(stop) for stop in stops]
        self._first_characters = frozenset(stop[0] for stop in stops)
        self._withheld = ""
        self.matched: str | None = None

    @property
    def num_withheld(self) -> int:
        """Characters that came in and are neither sent nor dropped yet."""
        return len(self._withheld)

    def push(self, text: str) -> tuple[str, bool]:
        """Takes the next text; returns what may be sent now, and whether a stop string matched.

        What is returned with a match is all that comes before the stop string, and the string
        itself where it is kept."""
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
                num_dropped = 0 if self._keeps_match else len(self.matched)
                return pending[: position - num_dropped], True
        num_safe = len(pending) - max(pattern.state for pattern in self._patterns)
        self._withheld = pending[num_safe:]
        return pending[:num_safe], False

    def flush(self) -> str:
        """At the end of the text: what was withheld, since no stop string can be completed now."""
        withheld, self._withheld = self._withheld, ""
        return withheld


class _Pattern:
    """One stop string, and how many of its characters the text so far ends with."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.state = 0
        self._fallback = _fallbacks(stop)

    def step(self, character: str) -> bool:
        """Takes one character; whether the stop string is complete with it."""
        while self.state and self.stop[self.state] != character:
            self.state = self._fallback[self.state - 1]
        if self.stop[self.state] == character:
            self.state += 1
        return self.state == len(self.stop)


def _fallbacks(stop: str) -> list[int]:
    """For each prefix, the length of its longest proper suffix that is a prefix of `stop` too.
    Source: Knuth, Morris and Pratt 1977."""
    fallbacks = [0]
    length = 0
    for character in stop[1:]:
        while length and stop[length] != character:
            length = fallbacks[length - 1]
        if stop[length] == character:
            length += 1
        fallbacks.append(length)
    return fallbacks
