"""The grammar that one answer must follow: a form that the request wants, tool calls, or either.

A dialect reads its own fields into a WantedGrammar.  Here the grammar is combined with that of the
tool calls, put after the reasoning, and compiled once to see that it can be.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace
from typing import Any

from llmsrv.api.generation.conversation import ToolDefinition
from llmsrv.api.generation.tools import ToolUse
from llmsrv.errors import ApiError
from llmsrv.registry.service import Service
from llmsrv.text.grammar import GrammarError
from llmsrv.text.grammar import after_reasoning_source
from llmsrv.text.grammar import alternation_source
from llmsrv.text.reasoning import THINK_END
from llmsrv.text.reasoning import THINK_START
from llmsrv.text.structural_tag import Format
from llmsrv.text.structural_tag import OrFormat
from llmsrv.text.structural_tag import RegexFormat
from llmsrv.text.structural_tag import TagFormat
from llmsrv.text.structural_tag import TagsWithSeparatorFormat
from llmsrv.text.structural_tag import TriggeredTagsFormat
from llmsrv.text.structural_tag import json_tag
from llmsrv.text.structural_tag import structural_tag_source
from llmsrv.text.tokenizer import Tokenizer
from llmsrv.text.tool_calls import ToolCallFormat

BAD_SCHEMA = "invalid_json_schema"
BAD_GRAMMAR = "invalid_grammar"

# With any of these keys a schema may allow properties that it does not list.
OPEN_SCHEMA_KEYS = frozenset(
    ("additionalProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref")
)
NO_JSON = r"\s*([^\s{\[](.|\n)*)?"  # what text/tool_calls.py reads as text in bare formats


@dataclass(frozen=True)
class WantedGrammar:
    """param, code: for the error if the grammar does not compile.  make_source: returns a source
    of text/grammar.py, or raises GrammarError."""

    param: str
    make_source: Callable[[], str]
    code: str = BAD_SCHEMA


async def answer_grammar(
    service: Service,
    answer_format: WantedGrammar | None,
    tools: ToolUse | None = None,
    is_thinking: bool | None = None,
) -> str:
    """The grammar for Submit; "" if the answer is free.

    answer_format  followed by an answer that does not call tools
    is_thinking    True if the prompt already opened the thinking block; None if the model does not
                   think
    Raises ApiError 400 naming the field of a grammar that does not compile.
    """
    wanted = _with_calls(answer_format, tools, service.text.tokenizer) if tools else answer_format
    if wanted is None:
        return ""
    try:
        source = wanted.make_source()
        if is_thinking is not None:
            tokenizer = service.text.tokenizer
            source = after_reasoning_source(source, tokenizer, THINK_START, THINK_END, is_thinking)
        return await service.text.grammars.check(source)
    except (GrammarError, RecursionError) as error:
        message = f"Invalid '{wanted.param}': {error}."
        raise ApiError(400, message, param=wanted.param, code=wanted.code) from None


def _with_calls(
    answer_format: WantedGrammar | None, tools: ToolUse, tokenizer: Tokenizer
) -> WantedGrammar | None:
    """Tool calls if there must be any; else the format or calls; else, for strict tools, free
    answers whose calls follow their schemas."""
    calls = WantedGrammar("tools", lambda: structural_tag_source(_calls(tools), tokenizer))
    if tools.must_call:
        return calls
    if answer_format is not None:
        make_format = answer_format.make_source
        return replace(
            answer_format,
            make_source=lambda: alternation_source(calls.make_source(), make_format()),
        )
    if any(tool.is_strict for tool in tools.callable.values()):
        free = _text_or_calls(tools)
        return WantedGrammar("tools", lambda: structural_tag_source(free, tokenizer))
    return None


# ---- Tool calls as structural tags


def _calls(tools: ToolUse) -> Format:
    """Calls and nothing else."""
    format = tools.format
    opening, closing = _tag_lines(format)
    tags = [_call_tag(format, tool, opening, closing) for tool in tools.callable.values()]
    calls = TagsWithSeparatorFormat(
        tags, format.separator, at_least_one=True, stop_after_first=tools.at_most_one
    )
    return TagFormat(format.opening + "[", calls, "]") if format.is_list else calls


def _text_or_calls(tools: ToolUse) -> Format:
    """Any text, in which the opening tag begins calls.  In a format whose calls need no opening
    tag: calls, or text that does not begin as JSON."""
    format = tools.format
    if format.is_bare:
        calls = _calls(tools)
        opened = [TagFormat(format.opening, calls, "")] if format.opening else []
        return OrFormat([calls, *opened, RegexFormat(NO_JSON)])
    opening, closing = (format.opening + "[", "]") if format.is_list else _tag_lines(format)
    tags = [_call_tag(format, tool, opening, closing) for tool in tools.callable.values()]
    return TriggeredTagsFormat([format.opening], tags)


def _tag_lines(format: ToolCallFormat) -> tuple[str, str]:
    return (f"{format.opening}\n", f"\n{format.closing}") if format.closing else ("", "")


def _call_tag(
    format: ToolCallFormat, tool: ToolDefinition, opening: str, closing: str
) -> TagFormat:
    begin = f'{opening}{{"name": {json.dumps(tool.name)}, "{format.arguments}": '
    schema = json.dumps(_arguments_schema(tool.parameters)).encode()
    return json_tag(begin, schema, "}" + closing)


def _arguments_schema(schema: dict[str, Any] | None) -> dict[str, Any]:
    """The schema of a call's arguments.  Unless it says something else, unlisted properties are
    not allowed: small models would invent them without end."""
    schema = {"type": "object", "properties": {}} | (schema or {})
    return schema if OPEN_SCHEMA_KEYS & schema.keys() else schema | {"additionalProperties": False}
