"""Finds tool calls in an answer as it arrives: takes text, returns content and calls.

Once the name is known, the call is emitted, and its arguments are streamed as JSON, as the model
writes them.  The texts that mark calls (a format's `marks`) are never content: a call that the end
of the answer cuts off is dropped, and so are marks around text that is no call.

A parser is a state machine over characters: the output does not depend on how the input is cut into
pieces, and the time is linear in the text.  The formats' own parsers are its subclasses.
"""

import re
from abc import ABC
from abc import abstractmethod
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmsrv.text.structural_tag import Format

# The tools that may be called: name -> JSON schema of the arguments.
Tools = Mapping[str, dict[str, Any] | None]
State = Callable[[], bool]
# A call to be written: its name, and its arguments as the value of their JSON.
WrittenCall = tuple[str, Any]

# A longer name is none: the text is not a call.
MAX_NAME_CHARS = 256
WHITESPACE = re.compile(r"\s*")


@dataclass
class CallDelta:
    """New text of one call.  name: set only in the first delta of a call."""

    index: int
    name: str | None
    arguments: str


class ToolCallFormat(ABC):
    """How a family of models writes its calls.

    has_short_ids  whether the model's template takes only ids of nine letters and digits
    """

    has_short_ids: bool = False

    @property
    @abstractmethod
    def openings(self) -> tuple[str, ...]:
        """The marks that begin a call or a list of calls, wherever they stand in text."""

    @property
    @abstractmethod
    def marks(self) -> tuple[str, ...]:
        """The texts that are never content, the openings included."""

    @abstractmethod
    def parser(self, tools: Tools, at_most_one: bool = False) -> "ToolCallParser":
        """A parser of one answer.  at_most_one: drop everything after the first call."""

    @abstractmethod
    def written(self, calls: Sequence[WrittenCall]) -> Iterator[str]:
        """The text of calls, in pieces; the marks around them are Markup.  At least one call."""

    @abstractmethod
    def calls(self, tools: Tools, at_most_one: bool) -> Format:
        """Calls and nothing else, for a grammar."""

    @abstractmethod
    def text_or_calls(self, tools: Tools) -> Format:
        """Any text in which calls follow their schemas, for a grammar."""


class ToolCallParser(ABC):
    """Parses the calls of one answer; num_calls counts those found so far."""

    def __init__(self, format: ToolCallFormat, tools: Tools, at_most_one: bool) -> None:
        self.num_calls = 0
        self._tools = tools
        self._openings = frozenset(format.openings)
        self._marks = _Marks(format.marks)
        self._at_most_one = at_most_one
        self._state: State = self._in_text
        self._text = ""  # the latest input; no state has taken it from _position on yet
        self._position = 0
        self._withheld: list[str] = []  # whitespace: dropped if a call follows
        self._content_end = ""  # the last characters of the content so far
        self._follows_mark = False  # nothing stands between the content so far and a dropped mark
        self._content: list[str] = []
        self._calls: list[CallDelta] = []

    @property
    def has_ended(self) -> bool:
        """True if the only call that is allowed is complete: what follows is dropped."""
        return self._state == self._in_rest

    def push(self, text: str) -> tuple[str, list[CallDelta]]:
        """Takes the next text; returns the new content and the new deltas of calls."""
        self._text, self._position = self._text[self._position :] + text, 0
        while self._position < len(self._text) and self._state():
            pass
        return self._take_output()

    def flush(self, is_cut: bool = False) -> tuple[str, list[CallDelta]]:
        """At the end of the answer.  A call whose arguments have not begun is dropped.

        is_cut: the answer would have gone on, so even one character may have begun a mark."""
        if not is_cut or self._state != self._in_text:
            self._emit_text(self._uncalled_rest())
        if not self.num_calls:
            self._content += self._withheld
        self._text, self._position, self._withheld = "", 0, []
        return self._take_output()

    def _uncalled_rest(self) -> str:
        """Text that was held back because it could have begun a call."""
        rest = self._text[self._position :]
        # A single character that may begin a mark is more likely to be text.
        return rest if self._state == self._in_text and len(rest) == 1 else ""

    def _take_output(self) -> tuple[str, list[CallDelta]]:
        content, calls = "".join(self._content), self._calls
        self._content, self._calls = [], []
        return content, calls

    # ---- The states: each takes what it can, and returns True if the next state can continue.

    def _in_text(self) -> bool:
        mark = self._marks.find(self._text, self._position)
        if mark is None:
            end = len(self._text) - self._marks.partial_length(self._text, self._position)
            self._emit_text(self._take_to(end))
            return False
        self._emit_text(self._take_to(mark.start()))
        self._take_to(mark.end())
        self._follows_mark = True
        if mark[0] in self._openings:
            self._state = self._after_opening(mark[0])
        return True

    @abstractmethod
    def _after_opening(self, opening: str) -> State:
        """The state after an opening."""

    def _in_rest(self) -> bool:
        """Drops what follows the only call."""
        self._take_to(len(self._text))
        return False

    # ---- Actions of the states

    @property
    def _next(self) -> str:
        """The next character; "" if it has not arrived yet."""
        return self._text[self._position : self._position + 1]

    def _take_to(self, end: int) -> str:
        begin, self._position = self._position, end
        return self._text[begin:end]

    def _take(self, characters: re.Pattern[str]) -> str:
        match = characters.match(self._text, self._position)
        return self._take_to(match.end()) if match else ""

    def _take_mark(self, mark: str) -> bool | None:
        """Takes the mark if it comes next; None if only its beginning has arrived."""
        rest = self._text[self._position : self._position + len(mark)]
        if rest == mark:
            self._take_to(self._position + len(mark))
            return True
        return None if mark.startswith(rest) else False

    def _emit_text(self, text: str) -> None:
        """Emits content; whitespace at its end is withheld until more text follows."""
        visible = text.rstrip()
        if visible:
            self._emit_visible("".join([*self._withheld, visible]))
            self._withheld = []
        self._withheld.append(text[len(visible) :])

    def _emit_visible(self, text: str) -> None:
        if self._follows_mark and self._marks.partial_length(self._content_end, 0):
            text = "\n" + text  # or the two sides of the dropped mark could make another one
        self._follows_mark = False
        self._content.append(text)
        self._content_end = (self._content_end + text)[-self._marks.max_chars :]

    def _treat_as_text(self, text: str = "") -> None:
        """It was not a call after all; text: what was taken of it."""
        if text:
            self._emit_text(self._marks.removed_from(text))
        self._state = self._in_text

    def _start_call(self, name: str, arguments: str) -> None:
        self._calls.append(CallDelta(self.num_calls, name, arguments))
        self.num_calls += 1
        self._withheld = []

    def _emit_arguments(self, text: str) -> None:
        if self._calls:  # the last one is of this call; a new call would start with its name
            self._calls[-1].arguments += text
        elif text:
            self._calls.append(CallDelta(self.num_calls - 1, None, text))

    def _end_call(self, next_state: State) -> None:
        self._follows_mark = True
        self._state = self._in_rest if self._at_most_one else next_state


class _Marks:
    """Finds the marks of a format in text."""

    def __init__(self, marks: Sequence[str]) -> None:
        self.max_chars = max(map(len, marks), default=1)
        longest_first = sorted(marks, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._prefixes = frozenset(prefix for mark in marks for prefix in _prefixes(mark))
        self._first_characters = frozenset(mark[0] for mark in marks)

    def find(self, text: str, position: int) -> re.Match[str] | None:
        return self._pattern.search(text, position)

    def begins(self, text: str, position: int) -> bool | None:
        """Whether a mark begins at the position; None if only its beginning has arrived."""
        if self._pattern.match(text, position):
            return True
        return None if text[position:] in self._prefixes else False

    def partial_length(self, text: str, position: int) -> int:
        """How many characters at the end of text[position:] may begin a mark."""
        for start in range(max(position, len(text) - self.max_chars + 1), len(text)):
            if text[start] in self._first_characters and text[start:] in self._prefixes:
                return len(text) - start
        return 0

    def removed_from(self, text: str) -> str:
        return self._pattern.sub(" ", text)


def _prefixes(mark: str) -> Iterator[str]:
    """What a mark that is cut off may look like: in bytes, DeepSeek's end within a character."""
    for size in range(1, len(mark)):
        yield mark[:size]
        if not mark[size].isascii():
            yield mark[:size] + "\ufffd"
