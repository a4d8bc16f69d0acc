"""Calls written as call:f{a:1,b:[...]}, with marks of their own around strings: FunctionGemma and
Gemma 4.

An argument is emitted as JSON when it is complete.
Sources: the chat templates of the models.
"""

import json
import re
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmsrv.text.grammar import GrammarError
from llmsrv.text.grammar import checked_schema
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
from llmsrv.text.tool_calls.python_calls import listed_arguments
from llmsrv.text.tool_calls.values import ArgumentSchemas
from llmsrv.text.tool_calls.values import Schema
from llmsrv.text.tool_calls.values import arguments_object
from llmsrv.text.tool_calls.values import arguments_schema
from llmsrv.text.tool_calls.values import json_of

MAX_DEPTH = 100  # brackets within brackets
_MAX_SCHEMA_DEPTH = 6  # to which a schema is followed into the values within an argument
_MAX_VALUES = 1000
_HEADER = re.compile(r"\s*call:\s*(?P<name>[\w.-]+)\s*\{")
_BARE = re.compile(r"[^,\]}]*+")
_NUMBER_KEYS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_TYPES = frozenset(("string", "number", "integer", "boolean", "null", "object", "array"))
_ANY_KEY = r"[^\s:,{}\[\]<>]+"


@dataclass(frozen=True)
class BraceFormat(ToolCallFormat):
    """quote: the mark on both sides of a string.  more_marks: that may follow a call."""

    opening: str
    closing: str
    quote: str
    more_marks: tuple[str, ...] = ()

    @property
    def openings(self) -> tuple[str, ...]:
        return (self.opening,)

    @property
    def marks(self) -> tuple[str, ...]:
        return (self.opening, self.closing, self.quote, *self.more_marks)

    def parser(self, tools: Tools, at_most_one: bool = False) -> ToolCallParser:
        return BraceCallParser(self, tools, at_most_one)

    def written(self, calls: Sequence[WrittenCall]) -> Iterator[str]:
        for name, arguments in calls:
            yield Markup(self.opening)
            yield f"call:{name}"
            yield from self.written_value(arguments_object(arguments))
            yield Markup(self.closing)

    def written_value(self, value: Any) -> Iterator[str]:
        """A value of JSON in pieces."""
        if isinstance(value, str):
            yield from (Markup(self.quote), value, Markup(self.quote))
        elif isinstance(value, dict):
            for number, (key, item) in enumerate(value.items()):
                yield f"{',' if number else '{'}{key}:"
                yield from self.written_value(item)
            yield "}" if value else "{}"
        elif isinstance(value, list):
            yield "["
            for number, item in enumerate(value):
                yield "," if number else ""
                yield from self.written_value(item)
            yield "]"
        else:
            yield json.dumps(value)

    def calls(self, tools: Tools, at_most_one: bool) -> Format:
        return TagsWithSeparatorFormat(
            self._call_tags(tools), "", at_least_one=True, stop_after_first=at_most_one
        )

    def text_or_calls(self, tools: Tools) -> Format:
        return TriggeredTagsFormat([self.opening], self._call_tags(tools))

    def _call_tags(self, tools: Tools) -> list[TagFormat]:
        for schema in tools.values():
            checked_schema(arguments_schema(schema))  # so that a keyword is refused as elsewhere
        return [
            TagFormat(
                f"{self.opening}call:{name}{{",
                _ArgumentsGrammar(self).arguments(ArgumentSchemas(schema)),
                "}" + self.closing,
            )
            for name, schema in tools.items()
        ]


class _ArgumentsGrammar:
    """The arguments of one tool.  What its schema says is followed to a depth, and repeated where
    it refers to itself, so the number of values is limited."""

    def __init__(self, format: BraceFormat) -> None:
        self._format = format
        self._num_values = 0

    def arguments(self, schemas: ArgumentSchemas, depth: int = 0) -> Format:
        texts: dict[str, Format] = {
            name: SequenceFormat(
                [ConstStringFormat(f"{name}:"), self._value(schemas, schemas.of(name), depth)]
            )
            for name in schemas.properties
        }
        return listed_arguments(schemas, texts, ",")

    def _value(self, schemas: ArgumentSchemas, schema: Schema, depth: int) -> Format:
        self._num_values += 1
        if self._num_values > _MAX_VALUES:
            raise GrammarError(f"a tool has more than {_MAX_VALUES} values")
        if (choices := schemas.choices_of(schema)) is not None:
            texts = ["".join(self._format.written_value(choice)) for choice in choices]
            return OrFormat([ConstStringFormat(text) for text in texts])
        types = sorted(schemas.types_of(schema) & _TYPES)
        schema = schemas.resolved(schema)
        return OrFormat([self._value_of_type(type, schemas, schema, depth) for type in types])

    def _value_of_type(
        self, type: str, schemas: ArgumentSchemas, schema: Schema, depth: int
    ) -> Format:
        quote = self._format.quote
        if type == "string":
            return TagFormat(quote, AnyTextFormat(), quote)
        if type == "array":
            return TagFormat("[", _several(self._inner(schemas, schema, "items", depth)), "]")
        if type == "object":
            inner = schemas.within(schema)
            if inner.properties and depth < _MAX_SCHEMA_DEPTH:
                return TagFormat("{", self.arguments(inner, depth + 1), "}")
            value = self._inner(schemas, schema, "additionalProperties", depth)
            pair = SequenceFormat([RegexFormat(_ANY_KEY), ConstStringFormat(":"), value])
            return TagFormat("{", _several(pair), "}")
        bounds = {key: schema[key] for key in _NUMBER_KEYS if key in schema}
        return json_tag("", json.dumps({"type": type} | bounds).encode(), "")

    def _inner(self, schemas: ArgumentSchemas, schema: Schema, key: str, depth: int) -> Format:
        inner = schema.get(key)
        if depth < _MAX_SCHEMA_DEPTH and isinstance(inner, dict):
            return self._value(schemas, inner, depth + 1)
        scalars = ("string", "number", "boolean", "null")
        return OrFormat([self._value_of_type(type, schemas, {}, depth) for type in scalars])


def _several(value: Format) -> Format:
    return TagsWithSeparatorFormat([TagFormat("", value, "")], ",")


class BraceCallParser(ToolCallParser):
    def __init__(self, format: BraceFormat, tools: Tools, at_most_one: bool) -> None:
        super().__init__(format, tools, at_most_one)
        self._quote = format.quote
        self._special = re.compile(rf"{re.escape(format.quote)}|[{{}}\[\],]")
        self._schemas = ArgumentSchemas(None)
        self._argument: list[str] = []
        self._num_arguments = 0  # of the current call
        self._depth = 0  # of brackets within the argument
        self._is_in_string = False

    def _after_opening(self, opening: str) -> State:
        return self._in_header

    def _in_header(self) -> bool:
        brace = self._text.find("{", self._position, self._position + MAX_NAME_CHARS)
        if brace < 0 and len(self._text) - self._position < MAX_NAME_CHARS:
            return False
        header = _HEADER.fullmatch(self._text, self._position, brace + 1)
        if header is None:
            self._treat_as_text()
            return True
        self._take_to(brace + 1)
        self._start_call(header["name"], "{")
        self._schemas = ArgumentSchemas(self._tools.get(header["name"]))
        self._argument, self._num_arguments, self._depth = [], 0, 0
        self._is_in_string = False
        self._state = self._in_arguments
        return True

    def _in_arguments(self) -> bool:
        if self._is_in_string:
            start = self._text.find(self._quote, self._position)
            found = self._quote if start >= 0 else ""
        else:
            match = self._special.search(self._text, self._position)
            start, found = (match.start(), match[0]) if match else (-1, "")
        if not found:
            self._argument.append(self._take_to(len(self._text) - self._num_partial()))
            return False
        self._argument.append(self._take_to(start))
        self._take_to(start + len(found))
        if found == self._quote:
            self._is_in_string = not self._is_in_string
        elif found in "{[":
            self._depth += 1
        elif self._depth == 0:
            self._end_argument(is_last=found != ",")
            return True
        elif found != ",":
            self._depth -= 1
        self._argument.append(found)
        return True

    def _num_partial(self) -> int:
        """How many characters at the end may begin a quote."""
        size = min(len(self._quote) - 1, len(self._text) - self._position)
        return next(n for n in range(size, -1, -1) if self._text.endswith(self._quote[:n]))

    def _end_argument(self, is_last: bool) -> None:
        text, self._argument = "".join(self._argument), []
        if text.strip():
            key, _, value = text.partition(":")
            key = key.strip().removeprefix(self._quote).removesuffix(self._quote)
            separator = ", " if self._num_arguments else ""
            self._num_arguments += 1
            written = json_of_value(value, self._quote, self._schemas.types(key))
            self._emit_arguments(f"{separator}{json.dumps(key, ensure_ascii=False)}: {written}")
        if is_last:
            self._emit_arguments("}")
            self._end_call(self._after_call)

    def _after_call(self) -> bool:
        self._take(WHITESPACE)
        if self._next:
            self._state = self._in_text
        return True


def json_of_value(text: str, quote: str, types: frozenset[str]) -> str:
    """JSON of a value.  What is written without marks has one of the types, or is a string."""
    text = text.strip()
    if not text.startswith((quote, "{", "[")):
        return json_of(text, types)
    try:
        reader = _Reader(text, quote)
        value = reader.value(MAX_DEPTH)
        if text[reader.position :].strip():
            raise ValueError("a value is followed by more")
    except ValueError:
        value = text.replace(quote, "")
    return json.dumps(value, ensure_ascii=False)


class _Reader:
    """Reads one value; position: up to where the text is read."""

    def __init__(self, text: str, quote: str) -> None:
        self.position = 0
        self._text = text
        self._quote = quote

    def value(self, depth: int) -> Any:
        if not depth:
            raise ValueError("the value is nested too deeply")
        self._skip_space()
        if self._take(self._quote):
            return self._up_to(self._quote)
        if self._take("["):
            return [self.value(depth - 1) for _ in self._items("]")]
        if self._take("{"):
            pairs = {}
            for _ in self._items("}"):
                key = self._key()
                pairs[key] = self.value(depth - 1)
            return pairs
        bare = _BARE.match(self._text, self.position)
        assert bare is not None
        self.position = bare.end()
        return json.loads(json_of(bare[0].strip(), frozenset(("number", "boolean", "null"))))

    def _items(self, closing: str) -> Iterator[None]:
        """Once for each item, which the caller reads, up to the closing bracket."""
        self._skip_space()
        while not self._take(closing):
            yield
            self._skip_space()
            if not self._take(",") and not self._text.startswith(closing, self.position):
                raise ValueError(f"{closing!r} is missing")
            self._skip_space()

    def _key(self) -> str:
        self._skip_space()
        if not self._take(self._quote):
            return self._up_to(":").strip()
        key = self._up_to(self._quote)
        self._up_to(":")
        return key

    def _up_to(self, end: str) -> str:
        found = self._text.find(end, self.position)
        if found < 0:
            raise ValueError(f"{end!r} is missing")
        begin, self.position = self.position, found + len(end)
        return self._text[begin:found]

    def _take(self, text: str) -> bool:
        is_next = self._text.startswith(text, self.position)
        self.position += len(text) if is_next else 0
        return is_next

    def _skip_space(self) -> None:
        match = WHITESPACE.match(self._text, self.position)
        assert match is not None
        self.position = match.end()
