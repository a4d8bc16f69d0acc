"""Calls written as Python, [f(a=1, b="x"), g()]: Llama's pythonic lists, LFM2, OLMo 3.

An argument is emitted as JSON when it is complete.
Sources: the chat templates of the models, and vLLM's documentation of its tool parsers.
"""

import json
import re
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from llmsrv.text.marked_text import Markup
from llmsrv.text.structural_tag import ConstStringFormat
from llmsrv.text.structural_tag import Format
from llmsrv.text.structural_tag import JSONSchemaFormat
from llmsrv.text.structural_tag import OrFormat
from llmsrv.text.structural_tag import RegexFormat
from llmsrv.text.structural_tag import SequenceFormat
from llmsrv.text.structural_tag import TagFormat
from llmsrv.text.structural_tag import TagsWithSeparatorFormat
from llmsrv.text.structural_tag import TriggeredTagsFormat
from llmsrv.text.tool_calls.parser import MAX_NAME_CHARS
from llmsrv.text.tool_calls.parser import State
from llmsrv.text.tool_calls.parser import ToolCallFormat
from llmsrv.text.tool_calls.parser import ToolCallParser
from llmsrv.text.tool_calls.parser import Tools
from llmsrv.text.tool_calls.parser import WHITESPACE
from llmsrv.text.tool_calls.parser import WrittenCall
from llmsrv.text.tool_calls.python_literals import write_literal
from llmsrv.text.tool_calls.values import ArgumentSchemas
from llmsrv.text.tool_calls.values import arguments_object
from llmsrv.text.tool_calls.values import json_of_python

_NO_LIST = r"\s*([^\s\[](.|\n)*)?"  # what the parser reads as text in bare formats
# An argument that may be left out can be the first of a call only if it is one of the first listed:
# the grammar would grow with the square of their number.
_MAX_FIRST = 12
_BEFORE_CALL = re.compile(r"[\s\[,]*")
_NAME = re.compile(r"([A-Za-z_][\w.-]*)\s*(\()?")
_SEPARATORS = re.compile(r"[\s,;]*")
_KEYWORD = re.compile(r"\s*(?:([A-Za-z_]\w*)\s*=(?!=))?")


@dataclass(frozen=True)
class PythonFormat(ToolCallFormat):
    """around: the marks around the list; empty where an answer that begins with [ and the name of
    a tool is a call.  lines: calls stand on lines of their own, without the brackets of a list."""

    around: tuple[str, ...] = ()
    lines: bool = False

    @property
    def openings(self) -> tuple[str, ...]:
        return self.around[:1]

    @property
    def marks(self) -> tuple[str, ...]:
        return self.around

    def parser(self, tools: Tools, at_most_one: bool = False) -> ToolCallParser:
        return PythonCallParser(self, tools, at_most_one)

    def written(self, calls: Sequence[WrittenCall]) -> Iterator[str]:
        begin, end = self._around_calls
        yield Markup(begin)
        for number, (name, arguments) in enumerate(calls):
            yield self._separator if number else ""
            texts = [f"{key}={write_literal(v)}" for key, v in arguments_object(arguments).items()]
            yield f"{name}({', '.join(texts)})"
        yield Markup(end)

    def calls(self, tools: Tools, at_most_one: bool) -> Format:
        tags = [
            TagFormat(f"{name}(", _arguments(ArgumentSchemas(schema)), ")")
            for name, schema in tools.items()
        ]
        calls = TagsWithSeparatorFormat(
            tags, self._separator, at_least_one=True, stop_after_first=at_most_one
        )
        begin, end = self._around_calls
        return TagFormat(begin, calls, end)

    def text_or_calls(self, tools: Tools) -> Format:
        calls = self.calls(tools, at_most_one=False)
        if not self.around:
            return OrFormat([calls, RegexFormat(_NO_LIST)])
        assert isinstance(calls, TagFormat)
        return TriggeredTagsFormat([self.around[0]], [calls])

    @property
    def _separator(self) -> str:
        return "\n" if self.lines else ", "

    @property
    def _around_calls(self) -> tuple[str, str]:
        opening, closing = self.around or ("", "")
        begin, end = ("\n", "\n") if self.lines else ("[", "]")
        return opening + begin, end + closing


def _arguments(schemas: ArgumentSchemas) -> Format:
    texts = {name: _argument(name, schemas) for name in schemas.properties}
    return listed_arguments(schemas, texts, ", ")


def listed_arguments(
    schemas: ArgumentSchemas, texts: dict[str, Format], separator: str
) -> Format:
    """The required arguments in the order of the schema, then any of the others."""
    required = [name for name in texts if name in schemas.required]
    optional = [name for name in texts if name not in schemas.required]
    further: dict[str, Format] = {
        name: SequenceFormat([ConstStringFormat(separator), text]) for name, text in texts.items()
    }
    maybe: dict[str, Format] = {name: OrFormat([further[name], _NOTHING]) for name in optional}
    if required:
        first, *others = required
        elements = [texts[first], *(further[name] for name in others)]
        return SequenceFormat([*elements, *maybe.values()])
    either: list[Format] = [
        SequenceFormat([texts[name], *(maybe[later] for later in optional[i + 1 :])])
        for i, name in enumerate(optional[:_MAX_FIRST])
    ]
    return OrFormat([*either, _NOTHING])


def _argument(name: str, schemas: ArgumentSchemas) -> Format:
    constants = {"boolean": ["True", "False"], "null": ["None"]}
    types, value = schemas.types(name), schemas.standalone(name)
    texts = [text for type in constants if type in types for text in constants[type]]
    alternatives: list[Format] = list(map(ConstStringFormat, texts))
    if schemas.choices(name) is not None or not types <= constants.keys():
        alternatives.append(JSONSchemaFormat(msgspec.Raw(json.dumps(value).encode())))
    return SequenceFormat([ConstStringFormat(f"{name}="), OrFormat(alternatives)])


_NOTHING = ConstStringFormat("")


class PythonCallParser(ToolCallParser):
    def __init__(self, format: PythonFormat, tools: Tools, at_most_one: bool) -> None:
        super().__init__(format, tools, at_most_one)
        self._is_bare = not format.around  # and so a list is a call only if it names a tool
        self._leading: list[str] = []  # whitespace and brackets before a call
        self._schemas = ArgumentSchemas(None)
        self._argument: list[str] = []
        self._num_arguments = 0  # of the current call
        self._scanner = _PythonScanner()
        if self._is_bare:
            self._state = self._at_start

    def _uncalled_rest(self) -> str:
        rest = super()._uncalled_rest()
        if self._state == self._before_call and self._is_bare and not self.num_calls:
            name = self._text[self._position :]
            if name and not any(f"{tool}(".startswith(name) for tool in self._tools):
                return "".join([*self._leading, name])
        return rest

    def _after_opening(self, opening: str) -> State:
        return self._before_call

    def _at_start(self) -> bool:
        self._withheld.append(self._take(WHITESPACE))
        if self._next:
            self._state = self._before_call if self._next == "[" else self._in_text
        return True

    def _before_call(self) -> bool:
        self._leading.append(self._take(_BEFORE_CALL))
        if not self._next:
            return False
        name = _NAME.match(self._text, self._position)
        if name and not name[2] and name.end() == len(self._text):
            if len(name[0]) < MAX_NAME_CHARS:
                return False
        if name and name[2] and (not self._is_bare or name[1] in self._tools):
            self._take_to(name.end())
            self._begin_call(name[1])
        else:
            text, self._leading = "".join(self._leading), []
            self._treat_as_text(text if not self.num_calls else "")
        return True

    def _begin_call(self, name: str) -> None:
        self._start_call(name, "{")
        self._leading, self._argument, self._num_arguments = [], [], 0
        self._schemas = ArgumentSchemas(self._tools.get(name))
        self._scanner = _PythonScanner()
        self._state = self._in_arguments

    def _in_arguments(self) -> bool:
        end = self._scanner.end(self._text, self._position)
        self._argument.append(self._take_to(end))
        if not self._scanner.is_at_end or not self._next:
            return False
        closes = self._take_to(end + 1) != ","
        self._emit_argument("".join(self._argument), is_last=closes)
        self._argument = []
        if closes:
            self._emit_arguments("}")
            self._end_call(self._after_call)
        return True

    def _emit_argument(self, text: str, is_last: bool) -> None:
        if is_last and not text.strip():
            return
        keyword = _KEYWORD.match(text)
        assert keyword is not None
        names = list(self._schemas.properties)
        number = self._num_arguments
        position_name = names[number] if number < len(names) else f"arg{number}"
        separator = ", " if number else ""
        key = json.dumps(keyword[1] or position_name, ensure_ascii=False)
        self._emit_arguments(f"{separator}{key}: {json_of_python(text[keyword.end() :])}")
        self._num_arguments += 1

    def _after_call(self) -> bool:
        self._take(_SEPARATORS)
        if self._next == "]":
            self._take_to(self._position + 1)
            self._state = self._in_text
        elif self._next:
            self._state = self._before_call
        return True


class _PythonScanner:
    """Finds the end of one argument, a comma or closing bracket outside of strings and brackets,
    in text that arrives in pieces."""

    _SPECIAL = re.compile(r"""["'()\[\]{},]""")
    _IN_STRING = {quote: re.compile(rf"\\|{quote}") for quote in ('"', "'", '"' * 3, "'" * 3)}

    def __init__(self) -> None:
        self.is_at_end = False
        self._depth = 0
        self._quote = ""  # of the string that the text is in

    def end(self, text: str, position: int) -> int:
        """Returns the position of the end, or as far as the text can be read before more comes."""
        self.is_at_end = False
        while position < len(text):
            step = self._in_string if self._quote else self._in_code
            next_position = step(text, position)
            if self.is_at_end or next_position is None:
                return position if next_position is None else next_position
            position = next_position
        return position

    def _in_string(self, text: str, position: int) -> int | None:
        found = self._IN_STRING[self._quote].search(text, position)
        if found is None:
            # A part of the closing quotes may stand at the end.
            num_quotes = len(text) - len(text.rstrip(self._quote[0]))
            kept = len(text) - min(num_quotes, len(self._quote) - 1)
            return kept if kept > position else None
        if found[0] == "\\":
            is_whole = found.end() < len(text)
            return found.end() + 1 if is_whole else self._up_to(found.start(), position)
        self._quote = ""
        return found.end()

    def _in_code(self, text: str, position: int) -> int | None:
        found = self._SPECIAL.search(text, position)
        if found is None:
            return len(text)
        start, character = found.start(), found[0]
        if character in "\"'":
            quotes = text[start : start + 3]
            if len(quotes) < 3 and quotes == character * len(quotes):
                return self._up_to(start, position)
            self._quote = character * 3 if quotes == character * 3 else character
            return start + len(self._quote)
        if character in "([{":
            self._depth += 1
        elif self._depth == 0:
            self.is_at_end = True
            return start
        elif character != ",":
            self._depth -= 1
        return start + 1

    def _up_to(self, start: int, position: int) -> int | None:
        """The text can be read up to `start`; None if nothing of it can."""
        return start if start > position else None
