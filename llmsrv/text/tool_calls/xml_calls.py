"""Calls in tags, with each argument between tags of its own: Qwen3-Coder, Seed, MiniMax, GLM.

An argument is plain text.  The tool's schema says which type it has: a string is streamed as the
model writes it, other values when they are complete.
Sources: the chat templates of the models.
"""

import json
import re
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass

from llmsrv.text.marked_text import Markup
from llmsrv.text.structural_tag import AnyTextFormat
from llmsrv.text.structural_tag import ConstStringFormat
from llmsrv.text.structural_tag import Format
from llmsrv.text.structural_tag import OrFormat
from llmsrv.text.structural_tag import RegexFormat
from llmsrv.text.structural_tag import SequenceFormat
from llmsrv.text.structural_tag import TagFormat
from llmsrv.text.structural_tag import TagsWithSeparatorFormat
from llmsrv.text.structural_tag import TriggeredTagsFormat
from llmsrv.text.structural_tag import json_tag
from llmsrv.text.tool_calls.parser import MAX_NAME_CHARS
from llmsrv.text.tool_calls.parser import State
from llmsrv.text.tool_calls.parser import ToolCallFormat
from llmsrv.text.tool_calls.parser import ToolCallParser
from llmsrv.text.tool_calls.parser import Tools
from llmsrv.text.tool_calls.parser import WHITESPACE
from llmsrv.text.tool_calls.parser import WrittenCall
from llmsrv.text.tool_calls.values import ArgumentSchemas
from llmsrv.text.tool_calls.values import arguments_object
from llmsrv.text.tool_calls.values import json_of

_NAME = re.compile(r"[\w.-]+")
_KEY = re.compile(r'[^<>"\n]+')
_UP_TO_TAG = re.compile(r"[^<]+")


@dataclass(frozen=True)
class XmlFormat(ToolCallFormat):
    """The tags around calls, names and arguments.

    name   around the name: the tag that begins a function, and what ends the name
    key    around the name of an argument
    value  around an argument; the first is "" if the tag of the name begins it
    lines  whether an argument stands on lines of its own
    kinds  what follows the name of an argument that is a string, and of another one; "" if both
           are written alike
    """

    opening: str
    closing: str
    name: tuple[str, str]
    function_end: str
    key: tuple[str, str]
    value: tuple[str, str]
    lines: bool = False
    kinds: tuple[str, str] = ("", "")

    @property
    def openings(self) -> tuple[str, ...]:
        """Qwen3-Coder sometimes forgets the outer tag."""
        return tuple(filter(None, (self.opening, self.name[0])))

    @property
    def marks(self) -> tuple[str, ...]:
        ends = self.closing, self.function_end, self.key[1] if self.value[0] else ""
        return tuple(filter(None, dict.fromkeys((*self.openings, *ends, self.key[0], *self.value))))

    def parser(self, tools: Tools, at_most_one: bool = False) -> ToolCallParser:
        return XmlCallParser(self, tools, at_most_one)

    def written(self, calls: Sequence[WrittenCall]) -> Iterator[str]:
        for number, (name, arguments) in enumerate(calls):
            yield "\n" if number else ""
            yield Markup(self._begin)
            yield name
            yield Markup(self._name_end)
            for key, value in arguments_object(arguments).items():
                yield Markup(self.key[0])
                yield key
                yield Markup(self.key[1] + self._value_begin(isinstance(value, str)))
                yield value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                yield Markup(("\n" if self.lines else "") + self.value[1] + "\n")
            yield Markup(self._end)

    def calls(self, tools: Tools, at_most_one: bool) -> Format:
        return TagsWithSeparatorFormat(
            self._call_tags(tools), "\n", at_least_one=True, stop_after_first=at_most_one
        )

    def text_or_calls(self, tools: Tools) -> Format:
        return TriggeredTagsFormat([self.opening], self._call_tags(tools))

    def _call_tags(self, tools: Tools) -> list[TagFormat]:
        return [
            TagFormat(
                self._begin + name + self._name_end,
                self._arguments(ArgumentSchemas(schema)),
                self._end,
            )
            for name, schema in tools.items()
        ]

    @property
    def _begin(self) -> str:
        return self.opening + ("\n" if self.name[0] else "") + self.name[0]

    @property
    def _name_end(self) -> str:
        return self.name[1] + "\n"

    @property
    def _end(self) -> str:
        return f"{self.function_end}\n{self.closing}" if self.function_end else self.closing

    def _arguments(self, schemas: ArgumentSchemas) -> Format:
        """The arguments in the order of the schema."""
        elements: list[Format] = []
        for name in schemas.properties:
            argument = self._argument(name, schemas)
            is_required = name in schemas.required
            elements.append(argument if is_required else OrFormat([argument, _NOTHING]))
        if schemas.is_open:
            between = self.key[1] + self._value_begin(is_string=True)
            any_name = SequenceFormat(
                [RegexFormat(_KEY.pattern), ConstStringFormat(between), AnyTextFormat()]
            )
            other = TagFormat(self.key[0], any_name, self.value[1] + "\n")
            elements.append(TagsWithSeparatorFormat([other], ""))
        return SequenceFormat(elements) if elements else _NOTHING

    def _argument(self, name: str, schemas: ArgumentSchemas) -> Format:
        key, end = self.key[0] + name + self.key[1], self.value[1] + "\n"
        text_begin, other_begin = key + self._value_begin(True), key + self._value_begin(False)
        line_end = "\n" if self.lines else ""
        if (choices := schemas.choices(name)) is not None:
            texts = [
                text_begin + c if isinstance(c, str) else other_begin + json.dumps(c)
                for c in choices
            ]
            return TagFormat("", OrFormat(list(map(ConstStringFormat, texts))), line_end + end)
        text = TagFormat(text_begin, AnyTextFormat(), end)
        types = schemas.types(name)
        if types == {"string"} or "string" in types and text_begin == other_begin:
            return text
        schema = json.dumps(schemas.standalone(name)).encode()
        other = json_tag(other_begin, schema, line_end + end)
        return OrFormat([text, other]) if "string" in types else other

    def _value_begin(self, is_string: bool) -> str:
        kind = self.kinds[0] if is_string else self.kinds[1]
        before = "\n" if self.value[0] else ""
        return kind + before + self.value[0] + ("\n" if self.lines else "")


_NOTHING = ConstStringFormat("")


class XmlCallParser(ToolCallParser):
    def __init__(self, format: XmlFormat, tools: Tools, at_most_one: bool) -> None:
        super().__init__(format, tools, at_most_one)
        self._format = format
        self._schemas = ArgumentSchemas(None)
        self._num_arguments = 0  # of the current call
        self._key = ""
        self._types: frozenset[str] = frozenset()
        self._value: list[str] = []  # of an argument that is not streamed
        self._line_end = ""  # of a string, dropped if the string ends here
        self._is_value_start = False

    def _after_opening(self, opening: str) -> State:
        if opening == self._format.name[0]:
            return self._in_name
        return self._before_function

    def _before_function(self) -> bool:
        self._take(WHITESPACE)
        if not self._next:
            return False
        is_function = self._take_mark(self._format.name[0])
        if is_function is not None:
            self._state = self._in_name if is_function else self._in_text
        return is_function is not None

    def _in_name(self) -> bool:
        name = self._take_up_to(self._format.name[1].strip(), _NAME)
        if name is None:
            return False
        if not name:
            self._treat_as_text()
            return True
        self._start_call(name, "{")
        self._schemas = ArgumentSchemas(self._tools.get(name))
        self._num_arguments = 0
        self._state = self._in_function
        return True

    def _take_up_to(self, end: str, pattern: re.Pattern[str]) -> str | None:
        """Takes a name and what ends it: `end`, or a tag if that is a line end.

        "" if another text comes, None if the end has not arrived."""
        match = pattern.match(self._text, self._position)
        after = match.end() if match else self._position
        if after - self._position > MAX_NAME_CHARS:
            return ""
        if after == len(self._text):
            return None
        if match and not end:
            self._take_to(after)
            return match[0]
        rest = self._text[after : after + len(end)]
        if match and rest == end:
            self._take_to(after + len(end))
            return match[0]
        return None if match and end.startswith(rest) else ""

    def _in_function(self) -> bool:
        """Before an argument or the end of the call; other text between them is dropped."""
        self._take(_UP_TO_TAG)
        if not self._next:
            return False
        format = self._format
        ends = format.function_end, format.closing, *format.openings
        rest = self._text[self._position : self._position + self._marks.max_chars]
        if self._take_mark(format.key[0]):
            self._state = self._in_key
        elif any(mark and rest.startswith(mark) for mark in ends):
            self._end_function()
        elif any(mark.startswith(rest) for mark in (format.key[0], *ends)):
            return False
        else:
            self._take_to(self._position + 1)
        return True

    def _in_key(self) -> bool:
        key = self._take_up_to(self._format.key[1], _KEY)
        if key is None:
            return False
        self._key = key
        if not key:
            self._state = self._in_function
            return True
        self._types = self._schemas.types(key)
        self._state = self._in_kind if self._format.kinds[0] else self._after_key
        return True

    def _in_kind(self) -> bool:
        """A string or another value; it only matters if the schema allows both."""
        is_string, is_other = map(self._take_mark, self._format.kinds)
        if is_string is None or is_other is None and not is_string:
            return False
        if "string" in self._types:
            self._types = frozenset(("string",)) if is_string else self._types - {"string"}
        self._state = self._after_key if is_string or is_other else self._in_function
        return True

    def _after_key(self) -> bool:
        self._is_value_start, self._line_end, self._value = True, "", []
        if self._format.value[0]:
            self._state = self._before_value
        else:
            self._begin_value()
        return True

    def _before_value(self) -> bool:
        self._take(WHITESPACE)
        if not self._next:
            return False
        has_value = self._take_mark(self._format.value[0])
        if has_value:
            self._begin_value()
        elif has_value is False:
            self._state = self._in_function
        return has_value is not None

    def _begin_value(self) -> None:
        separator = ", " if self._num_arguments else ""
        self._num_arguments += 1
        self._emit_arguments(f"{separator}{json.dumps(self._key, ensure_ascii=False)}: ")
        if self._types == {"string"}:
            self._emit_arguments('"')
        self._state = self._in_value

    def _in_value(self) -> bool:
        """One line end after the opening tag and one before the closing tag are not part of it."""
        if self._is_value_start:
            if self._next == "\n":
                self._take_to(self._position + 1)
            self._is_value_start = False
            return True
        end = self._format.value[1]
        found = self._text.find(end, self._position)
        if found >= 0:
            self._take_value(self._take_to(found), is_last=True)
            self._take_to(found + len(end))
            self._state = self._in_function
            return True
        num_partial = next(
            n
            for n in range(min(len(end) - 1, len(self._text) - self._position), -1, -1)
            if self._text.endswith(end[:n])
        )
        self._take_value(self._take_to(len(self._text) - num_partial), is_last=False)
        return False

    def _take_value(self, text: str, is_last: bool) -> None:
        text, self._line_end = self._line_end + text, ""
        if text.endswith("\n"):
            text, self._line_end = text[:-1], "" if is_last else "\n"
        if self._types == {"string"}:
            self._emit_arguments(json.dumps(text, ensure_ascii=False)[1:-1])
            self._emit_arguments('"' if is_last else "")
            return
        self._value.append(text)
        if is_last:
            self._emit_arguments(json_of("".join(self._value), self._types))

    def _end_function(self) -> None:
        self._emit_arguments("}")
        self._end_call(self._after_function)

    def _after_function(self) -> bool:
        """The tags that end the call are dropped as marks.  Another function may follow within the
        outer tag, as in MiniMax's format."""
        self._take(WHITESPACE)
        if self._next:
            self._state = self._in_text
        return True
