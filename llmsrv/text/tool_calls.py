"""Finds tool calls in an answer as it arrives: text in, text for the reader and calls out.

Models write a call as JSON, {"name": ..., "arguments": {...}}, and differ in what they put around
it.  Once the name is known and the arguments begin, the call is told, and its arguments follow as
the model writes them.  What only looks like a call, or names no tool on offer, is text and comes
out in full.

The parser is an automaton over characters: what comes out does not depend on the pieces that go
in, and the time is linear in the text.  JSON is followed by its brackets and strings alone, so
arguments that are broken, or nested a hundred thousand deep, are text on its way like any other.
"""

import json
import re
from collections.abc import Callable
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ToolCallFormat:
    """What a family of models writes around its calls.

    opening    announces a call, or a list of calls; "" where nothing does
    closing    ends it; "" where nothing does
    arguments  the key of a call's arguments
    is_bare    whether an answer that begins as JSON is a call without the opening, too
    is_named   whether the name may stand before the arguments, outside of the JSON
    is_list    whether it is usually a list of calls that is announced
    separator  between calls, beside what announces them
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
_LONGEST_NAMED_HEADER = 256
_BRACKET_OR_QUOTE = re.compile(r'["{}\[\]]')
_QUOTE_OR_ESCAPE = re.compile(r'["\\]')
_BLANKS = re.compile(r"\s*")
_BLANKS_AND_LIST = re.compile(r"[\s\[]*")
_SEPARATORS = re.compile(r"[\s,;\]]*")


def detect_format(template: str) -> str:
    """The name of the format that a chat template shows its model."""
    for name, format in FORMATS.items():
        if format.opening and format.opening in template:
            return name
    return "llama3" if "ipython" in template else "json"


@dataclass
class CallDelta:
    """What is new of one call.  name: with its first piece only."""

    index: int
    name: str | None
    arguments: str


class ToolCallParser:
    """The calls of one answer; `num_calls` so far."""

    def __init__(
        self, format: ToolCallFormat, names: Collection[str], at_most_one: bool = False
    ) -> None:
        """names: the tools on offer.  at_most_one: what follows the first call is dropped."""
        self.num_calls = 0
        self._format = format
        self._names = names
        self._at_most_one = at_most_one
        self._state: Callable[[], bool] = self._at_start if format.is_bare else self._in_text
        self._text = ""  # what came last, and what of it no state has taken: from _position on
        self._position = 0
        self._withheld: list[str] = []  # blanks and what announces a call: dropped before a call
        self._object: list[str] = []  # what may become a call
        self._json = _JsonFollower()
        self._arguments_depth = 0  # of the bracket with which the arguments begin
        self._content: list[str] = []
        self._calls: list[CallDelta] = []

    def push(self, text: str) -> tuple[str, list[CallDelta]]:
        """Takes the next text; returns what of it is for the reader, and what is new of calls."""
        self._text, self._position = self._text[self._position :] + text, 0
        while self._position < len(self._text) and self._state():
            pass
        return self._taken()

    def flush(self) -> tuple[str, list[CallDelta]]:
        """At the end of the answer.  A call whose arguments have not begun is text."""
        rest = [*self._object, self._text[self._position :]]
        if self._state == self._before_call or any(rest) or not self.num_calls:
            self._content += [*self._withheld, *rest]
        self._text, self._withheld, self._object = "", [], []
        return self._taken()

    def _taken(self) -> tuple[str, list[CallDelta]]:
        content, calls = "".join(self._content), self._calls
        self._content, self._calls = [], []
        return content, calls

    # ---- The states: each takes what it can of the text, and says whether another may go on.

    def _at_start(self) -> bool:
        self._withhold(_BLANKS)
        is_json = self._next in ("{", "[")
        if self._next:
            self._state = self._before_call if is_json else self._in_text
        return True

    def _in_text(self) -> bool:
        opening = self._format.opening
        begin = self._text.find(opening, self._position) if opening else -1
        if begin < 0:
            num_open = _overlap(self._text, self._position, opening)
            self._tell(self._take_to(len(self._text) - num_open))
            return False
        self._tell(self._take_to(begin))
        self._withheld.append(self._take_to(begin + len(opening)))
        self._state = self._before_call
        return True

    def _before_call(self) -> bool:
        self._withhold(_BLANKS_AND_LIST)
        self._json = _JsonFollower()
        if self._next == "{":
            self._state = self._in_header
        elif self._next and self._format.is_named:
            self._state = self._in_named_header
        elif self._next:
            self._be_text()
        return True

    def _in_header(self) -> bool:
        """To the second bracket, where the arguments begin if the keys come as usual."""
        self._object.append(self._take_to(self._json.next_bracket(self._text, self._position)))
        if self._json.depth == 2:
            header = _HEADER.fullmatch("".join(self._object))
            if header and header[1] in self._names:
                self._begin(header[1], "{")
            else:
                self._state = self._in_object
        elif self._json.has_ended:
            self._end_object()
        return True

    def _in_named_header(self) -> bool:
        bracket = self._text.find("{", self._position, self._position + _LONGEST_NAMED_HEADER)
        if bracket < 0 and len(self._text) - self._position < _LONGEST_NAMED_HEADER:
            return False
        header = _NAMED_HEADER.fullmatch(self._text, self._position, bracket + 1)
        if header and header[1] in self._names:
            self._take_to(self._json.next_bracket(self._text, bracket))
            self._begin(header[1], "{")
        else:
            self._be_text()
        return True

    def _in_object(self) -> bool:
        """A call in another order of keys: known only when it is complete."""
        self._object.append(self._take_to(self._json.end(self._text, self._position, 1)))
        if self._json.has_ended:
            self._end_object()
        return True

    def _in_arguments(self) -> bool:
        end = self._json.end(self._text, self._position, self._arguments_depth)
        self._tell_arguments(self._take_to(end))
        if self._json.depth < self._arguments_depth:
            self._state = self._after_arguments
        return True

    def _after_arguments(self) -> bool:
        """What is left of the object means nothing here."""
        self._take_to(self._json.end(self._text, self._position, 1))
        if self._json.has_ended:
            self._state = self._after_call
        return True

    def _after_call(self) -> bool:
        if self._at_most_one:
            self._take_to(len(self._text))
            return False
        self._take_to(_end_of(_SEPARATORS, self._text, self._position))
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

    # ---- What they do

    @property
    def _next(self) -> str:
        """The character that comes next, "" where it has not come yet."""
        return self._text[self._position : self._position + 1]

    def _take_to(self, end: int) -> str:
        begin, self._position = self._position, end
        return self._text[begin:end]

    def _withhold(self, characters: re.Pattern[str]) -> None:
        self._withheld.append(self._take_to(_end_of(characters, self._text, self._position)))

    def _tell(self, text: str) -> None:
        """Text for the reader; blanks at its end wait for what follows."""
        visible = text.rstrip()
        if visible:
            self._content += [*self._withheld, visible]
            self._withheld = []
        self._withheld.append(text[len(visible) :])

    def _be_text(self) -> None:
        """It was no call after all."""
        self._content += [*self._withheld, *self._object]
        self._withheld, self._object = [], []
        self._state = self._in_text

    def _tell_arguments(self, text: str) -> None:
        if self._calls:  # the last is of this call, as another would begin with its name
            self._calls[-1].arguments += text
        else:
            self._calls.append(CallDelta(self.num_calls - 1, None, text))

    def _begin(self, name: str, arguments: str) -> None:
        self._calls.append(CallDelta(self.num_calls, name, arguments))
        self.num_calls += 1
        self._withheld, self._object = [], []
        self._arguments_depth = self._json.depth
        self._state = self._in_arguments

    def _end_object(self) -> None:
        call = _call_of("".join(self._object))
        if call and call[0] in self._names:
            self._begin(*call)
            self._state = self._after_call
        else:
            self._be_text()


def _call_of(text: str) -> tuple[str, str] | None:
    """Name and arguments of a complete object, whatever the order of its keys; None if it is no
    call."""
    try:
        call = json.loads(text)
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


def _end_of(pattern: re.Pattern[str], text: str, position: int) -> int:
    match = pattern.match(text, position)
    return match.end() if match else position


def _overlap(text: str, position: int, opening: str) -> int:
    """How many characters at the end of text[position:] may be the beginning of `opening`."""
    lengths = range(min(len(text) - position, len(opening) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(opening[:n])), 0)


class _JsonFollower:
    """Follows the brackets of a JSON value that comes in pieces; `depth` of them are open."""

    def __init__(self) -> None:
        self.depth = 0
        self.has_ended = False
        self._is_in_string = False
        self._is_escaped = False

    def next_bracket(self, text: str, position: int) -> int:
        """Where the text is behind its next bracket from `position` on; its end if it has none."""
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
        """Where the bracket that was opened as the depth-th is closed; the text's end if it is not
        in it."""
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
