"""Which tools the model may or must call in one turn, and in which format it writes the calls."""

import secrets
from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmsrv.api.generation.conversation import ToolChoice
from llmsrv.api.generation.conversation import ToolDefinition
from llmsrv.errors import invalid
from llmsrv.registry.service import Service
from llmsrv.text.json_schema import lenient_schema
from llmsrv.text.tool_calls.formats import FORMATS
from llmsrv.text.tool_calls.parser import ToolCallFormat
from llmsrv.text.tool_calls.parser import ToolCallParser

Simplify = Callable[[dict[str, Any]], dict[str, Any]]

# What is tried if a chat template shows no format that is known; the log says so at load.
UNKNOWN_FORMAT = "json"


@dataclass(frozen=True)
class ToolUse:
    """How the model may call tools.

    format       how it writes calls
    callable     the tools that it may call, by name
    must_call    it has to call at least one
    at_most_one  it may not call more than one
    is_limited   the model was also shown tools that it may not call
    """

    format: ToolCallFormat
    callable: dict[str, ToolDefinition]
    must_call: bool = False
    at_most_one: bool = False
    is_limited: bool = False

    def schemas(self, simplify: Simplify = lenient_schema) -> dict[str, dict[str, Any] | None]:
        """The schemas of the arguments; `simplify` is applied to those of tools that are not
        strict."""
        return {
            name: tool.parameters if tool.is_strict else simplify(tool.parameters or {})
            for name, tool in self.callable.items()
        }

    def parser(self) -> ToolCallParser:
        parameters = {name: tool.parameters for name, tool in self.callable.items()}
        return self.format.parser(parameters, self.at_most_one)

    def new_call_id(self) -> str:
        """A random id.  Mistral's templates accept only nine letters and digits."""
        is_short = self.format.has_short_ids
        return secrets.token_hex(5)[:9] if is_short else f"call_{secrets.token_hex(12)}"


def tool_use(
    service: Service, tools: Sequence[ToolDefinition], choice: ToolChoice
) -> ToolUse | None:
    """None without tools.  ApiError 400 if the choice names a tool that is not among them.

    The first call ends the answer if the chat template supports no more in a message: the model
    was not trained to write more."""
    if not tools:
        if choice.must_call or choice.allowed_names:
            raise invalid("tool_choice", "it is only allowed when 'tools' are given")
        return None
    tools_by_name = {tool.name: tool for tool in tools}
    for name in choice.allowed_names:
        if name not in tools_by_name:
            raise invalid("tool_choice", f"there is no tool '{name[:64]}'")
    return ToolUse(
        format=tool_call_format(service),
        callable={name: tools_by_name[name] for name in choice.allowed_names or tools_by_name},
        must_call=choice.must_call,
        at_most_one=choice.at_most_one or not _takes_several(service),
        is_limited=0 < len(set(choice.allowed_names)) < len(tools_by_name),
    )


def _takes_several(service: Service) -> bool:
    template = service.text.template
    return template is None or template.facts.takes_several_calls


def tool_call_format(service: Service) -> ToolCallFormat:
    """The format in which the model writes calls."""
    configured, template = service.config.tool_call_parser, service.text.template
    if configured != "auto":
        return FORMATS[configured]
    if template is not None and template.facts.has_tools:
        return FORMATS[template.tool_call_format or UNKNOWN_FORMAT]
    return FORMATS["hermes"]  # as template_messages.py describes tools to other templates
