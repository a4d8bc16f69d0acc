"""The tools of a chat request: what the model is told of, and what it may or must call."""

import json
import secrets
from dataclasses import dataclass
from typing import Any

from llmsrv.api.openai import structured
from llmsrv.api.openai.schema import AllowedToolsChoice
from llmsrv.api.openai.schema import ChatCompletionRequest
from llmsrv.api.openai.schema import NamedToolChoice
from llmsrv.api.openai.schema import Tool
from llmsrv.api.openai.structured import Wanted
from llmsrv.errors import ApiError
from llmsrv.registry.service import Service
from llmsrv.text.structural_tag import Either
from llmsrv.text.structural_tag import Format
from llmsrv.text.structural_tag import Regex
from llmsrv.text.structural_tag import SeparatedTags
from llmsrv.text.structural_tag import Tag
from llmsrv.text.structural_tag import TriggeredTags
from llmsrv.text.structural_tag import json_tag
from llmsrv.text.structural_tag import tags_source
from llmsrv.text.tool_calls import FORMATS
from llmsrv.text.tool_calls import ToolCallFormat
from llmsrv.text.tool_calls import ToolCallParser

# With one of these a schema may allow properties that it does not list.
OPENING_KEYS = frozenset(
    ("additionalProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref")
)
NO_JSON = r"\s*([^\s{\[](.|\n)*)?"  # as text/tool_calls.py takes it in bare formats


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


async def grammar_of(
    service: Service,
    asked: ChatCompletionRequest,
    use: ToolUse | None,
    is_thinking: bool | None,
) -> str:
    """The grammar for Submit: of calls where the model has to call, of the form that the request
    asks for or else calls, or of answers in which calls of `strict` tools keep to their schemas.

    is_thinking  as in structured.grammar_of, which says what is raised
    """
    if use is None:
        return await structured.grammar_of(service, asked, is_thinking)
    tokenizer = service.text.tokenizer
    calls = Wanted("tools", lambda: tags_source(_calls(use), tokenizer))
    if use.must_call:
        return await structured.checked(service, calls, is_thinking)
    if grammar := await structured.grammar_of(service, asked, is_thinking, or_else=calls.make):
        return grammar
    if not any(tool.function.strict for tool in use.callable.values()):
        return ""
    maybe_calls = Wanted("tools", lambda: tags_source(_maybe_calls(use), tokenizer))
    return await structured.checked(service, maybe_calls, is_thinking)


def _calls(use: ToolUse) -> Format:
    """Calls and nothing else."""
    form = use.format
    opening, closing = _around(form)
    tags = [_tag(form, tool, opening, closing) for tool in use.callable.values()]
    calls = SeparatedTags(tags, form.separator, at_least_one=True, stop_after_first=use.at_most_one)
    return Tag(form.opening + "[", calls, "]") if form.is_list else calls


def _maybe_calls(use: ToolUse) -> Format:
    """Any text, in which calls begin as they are announced; where nothing need announce them, calls
    or text that does not begin as JSON."""
    form = use.format
    if form.is_bare:
        calls = _calls(use)
        announced = [Tag(form.opening, calls, "")] if form.opening else []
        return Either([calls, *announced, Regex(NO_JSON)])
    opening, closing = (form.opening + "[", "]") if form.is_list else _around(form)
    tags = [_tag(form, tool, opening, closing) for tool in use.callable.values()]
    return TriggeredTags([form.opening], tags)


def _around(form: ToolCallFormat) -> tuple[str, str]:
    return (f"{form.opening}\n", f"\n{form.closing}") if form.closing else ("", "")


def _tag(form: ToolCallFormat, tool: Tool, opening: str, closing: str) -> Tag:
    """One call as the model is to write it."""
    begin = f'{opening}{{"name": {json.dumps(tool.function.name)}, "{form.arguments}": '
    schema = json.dumps(_closed(tool.function.parameters)).encode()
    return json_tag(begin, schema, "}" + closing)


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
