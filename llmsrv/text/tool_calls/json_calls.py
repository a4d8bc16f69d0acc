"""Calls written as JSON, {"name": ..., "arguments": {...}}.

The parser follows only the brackets and strings of JSON, so arguments that are broken, or nested a
hundred thousand deep, are passed on like any others.
Sources: the chat templates of the models, and vLLM's documentation of its tool parsers.
"""

import json
import re
from collections.abc import Collection
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmsrv.text import nested_json
from llmsrv.text.marked_text import Markup
from llmsrv.text.structural_tag import Format
from llmsrv.text.structural_tag import OrFormat
from llmsrv.text.structural_tag import RegexFormat
from llmsrv.text.structural_tag import TagFormat
from llmsrv.text.structural_tag import TagsWithSeparatorFormat
from llmsrv.text.structural_tag import TriggeredTagsFormat
from llmsrv.text.structural_tag import json_tag
from llmsrv.text.tool_calls.json_scanner import JsonScanner
from llmsrv.text.tool_calls.parser import MAX_NAME_CHARS
from llmsrv.text.tool_calls.parser import State
from llmsrv.text.tool_calls.parser import ToolCallFormat
from llmsrv.text.tool_calls.parser import ToolCallParser
from llmsrv.text.tool_calls.parser import Tools
from llmsrv.text.tool_calls.parser import WHITESPACE
from llmsrv.text.tool_calls.parser import WrittenCall
from llmsrv.text.tool_calls.values import arguments_schema

_NO_JSON = r"\s*([^\s{\[](.|\n)*)?"  # what the parser reads as text in bare formats
_HEADER = re.compile(
    r'\{\s*(?:"(?:type|id|tool_call_id)"\s*:\s*"[^"\\]*"\s*,\s*)*'
    r'"(?:tool_)?name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*\{'
)
_KEYED_HEADER = re.compile(r'\{\s*"([^"\\]*)"\s*:\s*\{')
_WHITESPACE_AND_LIST = re.compile(r"[\s\[]*")
_SEPARATORS = re.compile(r"[\s,;\]`]*")
# How far a header may have come, for a call that the end of the answer cuts off.
_CUT_HEADER = re.compile(
    r'[\s\[]*(?:\{\s*(?:"(?:type|id)"\s*:\s*"[^"\\]*"\s*,\s*)*(?:"function"\s*:\s*\{\s*)?'
    r'(?:"(?P<key>[a-z]*)|"(?:type|id)"\s*(?::\s*(?:"[^"\\]*"?\s*)?)?|"function"\s*:?\s*'
    r'|"(?:arguments|parameters)"\s*(?::\s*(?:\{.*)?)?'
    r'|"name"\s*(?::\s*(?:"(?P<name>[^"\\]*)(?P<end>"\s*(?:,.*)?)?)?)?)?)?',
    re.DOTALL,
)
_CALL_KEYS = ("name", "type", "id", "function", "arguments", "parameters")


@dataclass(frozen=True)
class JsonFormat(ToolCallFormat):
    """Calls as JSON objects.

    opening    precedes a call or a list of calls; "" if nothing does
    closing    ends it; "" if nothing does
    name       the key of a call's name
    arguments  the key of a call's arguments
    is_keyed   whether a call is only {name: arguments}
    is_bare    whether an answer that begins as JSON is also a call, without the opening
    is_list    whether the opening usually precedes a list of calls
    separator  text between calls, in addition to the opening
    header     matches a name outside the JSON, up to the bracket of its arguments; None: no call
               has one
    """

    opening: str = ""
    closing: str = ""
    name: str = "name"
    arguments: str = "arguments"
    is_keyed: bool = False
    is_bare: bool = False
    is_list: bool = False
    separator: str = "\n"
    header: re.Pattern[str] | None = None
    more_marks: tuple[str, ...] = ()
    has_short_ids: bool = False

    @property
    def openings(self) -> tuple[str, ...]:
        return (self.opening,) if self.opening else ()

    @property
    def marks(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.opening, self.closing, *self.more_marks)))

    def parser(self, tools: Tools, at_most_one: bool = False) -> ToolCallParser:
        return JsonCallParser(
            self, tools, at_most_one, self.header, self.is_bare, self.is_keyed
        )

    def written(self, calls: Sequence[WrittenCall]) -> Iterator[str]:
        opening, closing = self._tag_lines()
        if self.is_list:
            yield Markup(_list_opening(self.opening))
        for number, (name, arguments) in enumerate(calls):
            yield self.separator if number else ""
            yield Markup(opening)
            yield f"{self._call_begin(name)}{json.dumps(arguments, ensure_ascii=False)}}}"
            yield Markup(closing)
        if self.is_list:
            yield Markup("]" + self.closing)

    def calls(self, tools: Tools, at_most_one: bool) -> Format:
        opening, closing = self._tag_lines()
        calls = TagsWithSeparatorFormat(
            self._call_tags(tools, opening, closing),
            self.separator,
            at_least_one=True,
            stop_after_first=at_most_one,
        )
        if self.is_list:
            return TagFormat(_list_opening(self.opening), calls, "]" + self.closing)
        return calls

    def text_or_calls(self, tools: Tools) -> Format:
        """In a format whose calls need no opening: calls, or text that does not begin as JSON."""
        if self.is_bare:
            calls = self.calls(tools, at_most_one=False)
            opened = [TagFormat(self.opening, calls, "")] if self.opening else []
            return OrFormat([calls, *opened, RegexFormat(_NO_JSON)])
        if self.is_list:
            opening, closing = _list_opening(self.opening), "]" + self.closing
        else:
            opening, closing = self._tag_lines()
        return TriggeredTagsFormat([self.opening], self._call_tags(tools, opening, closing))

    def _tag_lines(self) -> tuple[str, str]:
        if self.is_list or not self.closing:
            return "", ""
        return f"{self.opening}\n", f"\n{self.closing}"

    def _call_tags(self, tools: Tools, opening: str, closing: str) -> list[TagFormat]:
        return [
            json_tag(
                opening + self._call_begin(name),
                json.dumps(arguments_schema(schema)).encode(),
                "}" + closing,
            )
            for name, schema in tools.items()
        ]

    def _call_begin(self, name: str) -> str:
        """A call up to its arguments."""
        written = json.dumps(name, ensure_ascii=False)
        if self.is_keyed:
            return f"{{{written}: "
        return f'{{"{self.name}": {written}, "{self.arguments}": '


class JsonCallParser(ToolCallParser):
    def __init__(
        self,
        format: ToolCallFormat,
        tools: Tools,
        at_most_one: bool,
        header: re.Pattern[str] | None = None,
        is_bare: bool = False,
        is_keyed: bool = False,
    ) -> None:
        super().__init__(format, tools, at_most_one)
        self._header = header
        self._is_keyed = is_keyed
        self._is_bare = is_bare  # until an opening is seen: JSON is a call only if a tool is named
        self._leading: list[str] = []  # whitespace and brackets before an object
        self._object: list[str] = []  # JSON that may become a call
        self._json = JsonScanner()
        self._arguments_depth = 0  # of the bracket that begins the arguments
        if is_bare:
            self._state = self._at_start

    def _uncalled_rest(self) -> str:
        rest = super()._uncalled_rest()
        if self._state in (self._before_call, self._in_header, self._in_object):
            text = "".join([*self._leading, *self._object])
            is_call = not self._is_bare or may_begin_call(text, self._tools)
            rest = "" if is_call else self._marks.removed_from(text)
        elif self._state == self._in_named_header:
            text = "".join([*self._leading, self._text[self._position :]])
            if " " in text.strip():  # as in no header
                rest = self._marks.removed_from(text)
        return rest

    def _after_opening(self, opening: str) -> State:
        self._is_bare = False
        return self._before_call

    def _at_start(self) -> bool:
        self._withheld.append(self._take(WHITESPACE))
        if self._next:
            self._state = self._before_call if self._next in "{[" else self._in_text
        return True

    def _before_call(self) -> bool:
        taken = self._take(_WHITESPACE_AND_LIST)
        is_mark = taken.endswith("[") and self._marks.begins(self._text, self._position - 1)
        if is_mark is not False:  # the last bracket is that of [TOOL_CALLS], or may be
            self._position -= 1
            if is_mark:
                self._leading, self._state = [], self._in_text
            else:
                self._leading.append(taken[:-1])
            return is_mark is True
        self._leading.append(taken)
        self._json = JsonScanner()
        if self._next == "{":
            self._state = self._in_header
        elif self._next and self._header:
            self._state = self._in_named_header
        elif self._next:
            self._treat_object_as_text()
        return True

    def _in_header(self) -> bool:
        """Up to the second bracket, where the arguments begin if the keys are in usual order."""
        self._object.append(self._take_to(self._json.next_bracket(self._text, self._position)))
        if self._json.depth == 2:
            pattern = _KEYED_HEADER if self._is_keyed else _HEADER
            header = pattern.fullmatch("".join(self._object))
            if header and self._is_callable(header[1]):
                self._start_arguments(header[1])
            else:
                self._state = self._in_object
        elif self._json.has_ended:
            self._end_object()
        return True

    def _in_named_header(self) -> bool:
        assert self._header is not None
        bracket = self._text.find("{", self._position, self._position + MAX_NAME_CHARS)
        if bracket < 0 and len(self._text) - self._position < MAX_NAME_CHARS:
            return False
        header = self._header.fullmatch(self._text, self._position, bracket + 1)
        if header:
            self._take_to(self._json.next_bracket(self._text, bracket))
            self._start_arguments(header["name"])
        else:
            self._treat_object_as_text()
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
        if not self._json.has_ended:
            self._take_to(self._json.end(self._text, self._position, 1))
        if self._json.has_ended:
            self._end_call(self._after_call)
        return True

    def _after_call(self) -> bool:
        self._take(_SEPARATORS)
        if self._next:
            self._state = self._before_call if self._next == "{" else self._in_text
        return True

    # ---- Actions of the states

    def _is_callable(self, name: str) -> bool:
        return not self._is_bare or name in self._tools

    def _start_arguments(self, name: str) -> None:
        self._start_call(name, "{")
        self._leading, self._object = [], []
        self._arguments_depth = self._json.depth
        self._state = self._in_arguments

    def _end_object(self) -> None:
        call = _parse_call("".join(self._object), self._is_keyed)
        if call and self._is_callable(call[0]):
            self._start_call(*call)
            self._leading, self._object = [], []
            self._end_call(self._after_call)
        else:
            self._treat_object_as_text()

    def _treat_object_as_text(self) -> None:
        text = "".join([*self._leading, *self._object])
        self._leading, self._object = [], []
        self._treat_as_text(text)


def may_begin_call(text: str, names: Collection[str]) -> bool:
    """True if the text may be the beginning of a call in JSON, up to its arguments."""
    cut = _CUT_HEADER.fullmatch(text)
    if cut is None:
        return False
    if cut["key"] is not None:
        return any(key.startswith(cut["key"]) for key in _CALL_KEYS)
    if cut["name"] is None:
        return True
    if cut["end"] is not None:
        return cut["name"] in names
    return any(name.startswith(cut["name"]) for name in names)


def _parse_call(text: str, is_keyed: bool) -> tuple[str, str] | None:
    """Name and arguments of a complete object with its keys in any order; None if not a call."""
    try:
        call = nested_json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(function := call.get("function"), dict):
        call = function
    name = call.get("name", call.get("tool_name"))
    if isinstance(name, str):
        return name, _as_json(call.get("arguments", call.get("parameters")))
    if is_keyed and len(call) == 1:
        return next((name, _as_json(arguments)) for name, arguments in call.items())
    return None


def _as_json(arguments: Any) -> str:
    if isinstance(arguments, str):
        return arguments
    return json.dumps({} if arguments is None else arguments, ensure_ascii=False)


def _list_opening(opening: str) -> str:
    return opening if opening.endswith("[") else opening + "["
