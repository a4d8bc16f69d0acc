"""Finds tool calls in an answer as it arrives: takes text, returns content and calls.

Models write a call as JSON, {"name": ..., "arguments": {...}}, and differ in the text around it.
Once the name is known and the arguments begin, the call is emitted, and its arguments are streamed
as the model writes them.  Text that only looks like a call, or that names an unknown tool, is
returned unchanged as content.

The parser is a state machine over characters: the output does not depend on how the input is cut
into pieces, and the time is linear in the text.  It follows only the brackets and strings of JSON,
so arguments that are broken, or nested a hundred thousand deep, are passed on like any others.
"""

import json
import re
from collections.abc import Callable
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from llmsrv.text import nested_json


@dataclass(frozen=True)
class ToolCallFormat:
    """What a family of models writes around its calls.

    opening    precedes a call or a list of calls; "" if nothing does
    closing    ends it; "" if nothing does
    arguments  the key of a call's arguments
    is_bare    whether an answer that begins as JSON is also a call, without the opening
    is_named   whether the name may come before the arguments, outside the JSON
    is_list    whether the opening usually precedes a list of calls
    separator  text between calls, in addition to the opening
    """

    opening: str
    closing: str = ""
    arguments: str = "arguments"
    is_bare: bool = False
    is_named: bool = False
    is_list: bool = False
    separator: str = "\n"


FORMATS = {
    "hermes": ToolCallFormat("<tool_call>", "</tool_call>"),
    "llama3": ToolCallFormat(
        "<|python_tag|>", arguments="parameters", is_bare=True, separator="; "
    ),
    "mistral": ToolCallFormat("[TOOL_CALLS]", is_named=True, is_list=True, separator=", "),
    "json": ToolCallFormat("", is_bare=True),
}

_HEADER = re.compile(
    r'\{\s*(?:"(?:type|id)"\s*:\s*"[^"\\]*"\s*,\s*)*"name"\s*:\s*"([^"\\]*)"\s*,'
    r'\s*"(?:arguments|parameters)"\s*:\s*\{'
)
_NAMED_HEADER = re.compile(r"([\w.-]+)(?:\[CALL_ID\][^\[{]*)?(?:\[ARGS\])?\s*\{")
_MAX_NAMED_HEADER_CHARS = 256
_BRACKET_OR_QUOTE = re.compile(r'["{}\[\]]')
_QUOTE_OR_ESCAPE = re.compile(r'["\\]')
_WHITESPACE = re.compile(r"\s*")
_WHITESPACE_AND_LIST = re.compile(r"[\s\[]*")
_SEPARATORS = re.compile(r"[\s,;\]]*")


def detect_format(template: str) -> str:
    """Returns the name of the format that a chat template uses."""
    for name, format in FORMATS.items():
        if format.opening and format.opening in template:
            return name
    return "llama3" if "ipython" in template else "json"


@dataclass
class CallDelta:
    """New text of one call.  name: set only in the first delta of a call."""

    index: int
    name: str | None
    arguments: str


class ToolCallParser:
    """Parses the calls of one answer; num_calls counts those found so far."""

    def __init__(
        self, format: ToolCallFormat, names: Collection[str], at_most_one: bool = False
    ) -> None:
        """names: the available tools.  at_most_one: drop everything after the first call."""
        self.num_calls = 0
        self._format = format
        self._names = names
        self._at_most_one = at_most_one
        self._state: Callable[[], bool] = self._at_start if format.is_bare else self._in_text
        self._text = ""  # the latest input; no state has taken it from _position on yet
        self._position = 0
        self._withheld: list[str] = []  # whitespace and openings: dropped if a call follows
        self._object: list[str] = []  # JSON that may become a call
        self._json = _JsonScanner()
        self._arguments_depth = 0  # of the bracket that begins the arguments
        self._content: list[str] = []
        self._calls: list[CallDelta] = []

    def push(self, text: str) -> tuple[str, list[CallDelta]]:
        """Takes the next text; returns the new content and the new deltas of calls."""
        self._text, self._position = self._text[self._position :] + text, 0
        while self._position < len(self._text) and self._state():
            pass
        return self._take_output()

    def flush(self) -> tuple[str, list[CallDelta]]:
        """At the end of the answer.  A call whose arguments have not begun becomes content."""
        rest = [*self._object, self._text[self._position :]]
        if self._state == self._before_call or any(rest) or not self.num_calls:
            self._content += [*self._withheld, *rest]
        self._text, self._withheld, self._object = "", [], []
        return self._take_output()

    def _take_output(self) -> tuple[str, list[CallDelta]]:
        content, calls = "".join(self._content), self._calls
        self._content, self._calls = [], []
        return content, calls

    # ---- The states: each takes what it can, and returns True if the next state can continue.

    def _at_start(self) -> bool:
        self._withhold(_WHITESPACE)
        is_json = self._next in ("{", "[")
        if self._next:
            self._state = self._before_call if is_json else self._in_text
        return True

    def _in_text(self) -> bool:
        opening = self._format.opening
        begin = self._text.find(opening, self._position) if opening else -1
        if begin < 0:
            num_open = _partial_opening_length(self._text, self._position, opening)
            self._emit_text(self._take_to(len(self._text) - num_open))
            return False
        self._emit_text(self._take_to(begin))
        self._withheld.append(self._take_to(begin + len(opening)))
        self._state = self._before_call
        return True

    def _before_call(self) -> bool:
        self._withhold(_WHITESPACE_AND_LIST)
        self._json = _JsonScanner()
        if self._next == "{":
            self._state = self._in_header
        elif self._next and self._format.is_named:
            self._state = self._in_named_header
        elif self._next:
            self._treat_as_text()
        return True

    def _in_header(self) -> bool:
        """Up to the second bracket, where the arguments begin if the keys are in usual order."""
        self._object.append(self._take_to(self._json.next_bracket(self._text, self._position)))
        if self._json.depth == 2:
            header = _HEADER.fullmatch("".join(self._object))
            if header and header[1] in self._names:
                self._start_call(header[1], "{")
            else:
                self._state = self._in_object
        elif self._json.has_ended:
            self._end_object()
        return True

    def _in_named_header(self) -> bool:
        bracket = self._text.find("{", self._position, self._position + _MAX_NAMED_HEADER_CHARS)
        if bracket < 0 and len(self._text) - self._position < _MAX_NAMED_HEADER_CHARS:
            return False
        header = _NAMED_HEADER.fullmatch(self._text, self._position, bracket + 1)
        if header and header[1] in self._names:
            self._take_to(self._json.next_bracket(self._text, bracket))
            self._start_call(header[1], "{")
        else:
            self._treat_as_text()
        return True

    def _in_object(self) -> bool:
        """A call with its keys in another order can only be parsed when it is complete."""
        self._object.append(self._take_to(self._json.end(self._text, self._position, 1)))
        if self._json.has_ended:
            self._end_object()
        return True

    def _in_arguments(self) -> bool:
        end = self._json.end(self._text, self._position, self._arguments_depth)
        self._emit_arguments(self._take_to(end))
        if self._json.depth < self._arguments_depth:
            self._state = self._after_arguments
        return True

    def _after_arguments(self) -> bool:
        """Drops the rest of the object."""
        self._take_to(self._json.end(self._text, self._position, 1))
        if self._json.has_ended:
            self._state = self._after_call
        return True

    def _after_call(self) -> bool:
        if self._at_most_one:
            self._take_to(len(self._text))
            return False
        self._take_to(_match_end(_SEPARATORS, self._text, self._position))
        closing = self._format.closing
        rest = self._text[self._position : self._position + len(closing)]
        if not self._next or (rest != closing and closing.startswith(rest)):
            return False
        if closing and rest == closing:
            self._take_to(self._position + len(closing))
            self._state = self._in_text
        else:
            self._state = self._before_call if self._next == "{" else self._in_text
        return True

    # ---- Actions of the states

    @property
    def _next(self) -> str:
        """The next character; "" if it has not arrived yet."""
        return self._text[self._position : self._position + 1]

    def _take_to(self, end: int) -> str:
        begin, self._position = self._position, end
        return self._text[begin:end]

    def _withhold(self, characters: re.Pattern[str]) -> None:
        self._withheld.append(self._take_to(_match_end(characters, self._text, self._position)))

    def _emit_text(self, text: str) -> None:
        """Emits content; whitespace at its end is withheld until more text follows."""
        visible = text.rstrip()
        if visible:
            self._content += [*self._withheld, visible]
            self._withheld = []
        self._withheld.append(text[len(visible) :])

    def _treat_as_text(self) -> None:
        """It was not a call after all."""
        self._content += [*self._withheld, *self._object]
        self._withheld, self._object = [], []
        self._state = self._in_text

    def _emit_arguments(self, text: str) -> None:
        if self._calls:  # the last one is of this call; a new call would start with its name
            self._calls[-1].arguments += text
        else:
            self._calls.append(CallDelta(self.num_calls - 1, None, text))

    def _start_call(self, name: str, arguments: str) -> None:
        self._calls.append(CallDelta(self.num_calls, name, arguments))
        self.num_calls += 1
        self._withheld, self._object = [], []
        self._arguments_depth = self._json.depth
        self._state = self._in_arguments

    def _end_object(self) -> None:
        call = _parse_call("".join(self._object))
        if call and call[0] in self._names:
            self._start_call(*call)
            self._state = self._after_call
        else:
            self._treat_as_text()


def _parse_call(text: str) -> tuple[str, str] | None:
    """Name and arguments of a complete object with its keys in any order; None if not a call."""
    try:
        call = nested_json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(function := call.get("function"), dict):
        call = function
    arguments = call.get("arguments", call.get("parameters"))
    if not isinstance(call.get("name"), str):
        return None
    return call["name"], _as_json(arguments)


def _as_json(arguments: Any) -> str:
    if isinstance(arguments, str):
        return arguments
    return json.dumps({} if arguments is None else arguments, ensure_ascii=False)


def _match_end(pattern: re.Pattern[str], text: str, position: int) -> int:
    match = pattern.match(text, position)
    return match.end() if match else position


def _partial_opening_length(text: str, position: int, opening: str) -> int:
    """How many characters at the end of text[position:] may begin `opening`."""
    lengths = range(min(len(text) - position, len(opening) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(opening[:n])), 0)


class _JsonScanner:
    """Tracks the brackets of a JSON value that arrives in pieces; `depth` of them are open."""

    def __init__(self) -> None:
        self.depth = 0
        self.has_ended = False
        self._is_in_string = False
        self._is_escaped = False

    def next_bracket(self, text: str, position: int) -> int:
        """Returns the position after the next bracket, or the end of the text."""
        while position < len(text):
            if self._is_in_string:
                position = self._string(text, position)
                continue
            found = _BRACKET_OR_QUOTE.search(text, position)
            if found is None:
                break
            position = found.end()
            if found[0] != '"':
                self.depth += 1 if found[0] in "{[" else -1
                self.has_ended = self.depth == 0
                return position
            self._is_in_string = True
        return len(text)

    def end(self, text: str, position: int, depth: int) -> int:
        """Returns the position after the bracket that closes the depth-th open one, or the end of
        the text."""
        while position < len(text) and self.depth >= depth:
            position = self.next_bracket(text, position)
        return position

    def _string(self, text: str, position: int) -> int:
        if self._is_escaped:
            self._is_escaped = False
            return position + 1
        found = _QUOTE_OR_ESCAPE.search(text, position)
        if found is None:
            return len(text)
        self._is_escaped = found[0] == "\\"
        self._is_in_string = self._is_escaped
        return found.end()
