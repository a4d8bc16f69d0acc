"""The tools of a chat request: what the model is told of, and what it may or must call."""

import json
import secrets
from dataclasses import dataclass
from typing import Any

from llmsrv.api import structured
from llmsrv.api.schema import AllowedToolsChoice
from llmsrv.api.schema import ChatCompletionRequest
from llmsrv.api.schema import NamedToolChoice
from llmsrv.api.schema import Tool
from llmsrv.api.service import Service
from llmsrv.errors import ApiError
from llmsrv.text.grammar import Tag
from llmsrv.text.tool_calls import FORMATS
from llmsrv.text.tool_calls import ToolCallFormat
from llmsrv.text.tool_calls import ToolCallParser

# With one of these a schema may allow properties that it does not list.
OPENING_KEYS = frozenset(
    ("additionalProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref")
)


@dataclass(frozen=True)
class ToolUse:
    """tools     those that the model is told of
    callable     those that it may call, by name
    must_call    whether it has to call one of them
    at_most_one  whether more than one call is too many
    """

    tools: list[Tool]
    format: ToolCallFormat
    callable: dict[str, Tool]
    must_call: bool
    at_most_one: bool

    def parser(self) -> ToolCallParser:
        return ToolCallParser(self.format, self.callable, self.at_most_one)


def tool_use(service: Service, asked: ChatCompletionRequest) -> ToolUse | None:
    """None where the model is to know of no tool.  ApiError 400 for a choice that cannot be."""
    choice, tools = asked.tool_choice, asked.tools or []
    if not tools:
        if choice not in (None, "none", "auto"):
            raise _invalid("it is only allowed when 'tools' are given")
        return None
    if choice == "none":
        return None
    mode, names = _chosen(choice)
    offered = {tool.function.name: tool for tool in tools}
    for name in names:
        if name not in offered:
            raise _invalid(f"there is no tool '{name[:64]}'")
    return ToolUse(
        tools=tools,
        format=FORMATS[_format_name(service)],
        callable={name: offered[name] for name in names or offered},
        must_call=mode == "required",
        at_most_one=asked.parallel_tool_calls is False or isinstance(choice, NamedToolChoice),
    )


def _chosen(choice: str | NamedToolChoice | AllowedToolsChoice | None) -> tuple[str, list[str]]:
    """Whether a call is "required", and the names that may be called, none standing for all."""
    if isinstance(choice, NamedToolChoice):
        return "required", [choice.function.name]
    if isinstance(choice, AllowedToolsChoice):
        allowed = choice.allowed_tools
        return allowed.mode, [tool.function.name for tool in allowed.tools]
    return choice or "auto", []


async def tool_grammar(service: Service, use: ToolUse, is_thinking: bool | None) -> str:
    """What the answer must follow so that the model calls one of its tools, or, where it need not,
    so that calls of `strict` tools keep to their schemas; "" for nothing.

    is_thinking  as in structured.grammar_of
    """
    form = use.format
    is_strict = any(tool.function.strict for tool in use.callable.values())
    if not use.must_call and not (is_strict and form.opening and not form.is_bare):
        return ""
    opening, closing = (form.opening + "[", "]") if form.is_list else ("", "")
    if not use.must_call:
        calls = [_call(form, tool, opening, closing) for tool in use.callable.values()]
        return await structured.tool_grammar(
            service, calls, triggers=[form.opening], is_thinking=is_thinking
        )
    return await structured.tool_grammar(
        service,
        [_call(form, tool) for tool in use.callable.values()],
        prefix=opening,
        separator=form.separator,
        suffix=closing,
        many=not use.at_most_one,
        is_thinking=is_thinking,
    )


def _call(form: ToolCallFormat, tool: Tool, opening: str = "", closing: str = "") -> Tag:
    """One call as the model is to write it."""
    if form.closing:
        opening, closing = f"{form.opening}\n", f"\n{form.closing}"
    begin = f'{opening}{{"name": {json.dumps(tool.function.name)}, "{form.arguments}": '
    return Tag(begin, _closed(tool.function.parameters), "}" + closing)


def _closed(schema: dict[str, Any] | None) -> dict[str, Any]:
    """The schema of a call's arguments, without further ones where it does not speak of them: small
    models would invent them without end."""
    schema = {"type": "object", "properties": {}} | (schema or {})
    return schema if OPENING_KEYS & schema.keys() else schema | {"additionalProperties": False}


def call_id(format: ToolCallFormat) -> str:
    """A number for a call.  Mistral's templates take nothing but nine letters and digits."""
    return secrets.token_hex(5)[:9] if format.is_named else f"call_{secrets.token_hex(12)}"


def _format_name(service: Service) -> str:
    asked, template = service.config.tool_call_parser, service.text.template
    if asked != "auto" or template is None:
        return "hermes" if asked == "auto" else asked
    # A template without tools gets them as prompt.py words them.
    return template.tool_call_format if template.knows("tools") else "hermes"


def _invalid(reason: str) -> ApiError:
    message = f"Invalid 'tool_choice': {reason}."
    return ApiError(400, message, param="tool_choice", code="invalid_value")
