"""A conversation in plain types: what every dialect translates its messages and tools into.

A dialect validates its own messages first, as only it knows how its clients call their parts.  What
is found out later, with the model's chat template, is reported under the names in ParamNames.
"""

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from typing import Any
from typing import Literal


@dataclass(frozen=True)
class ToolCall:
    """A call that the assistant made earlier.  arguments: JSON as the model wrote it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Message:
    """One message.

    content       None only for an assistant that called tools without saying anything
    name          of the participant, for templates that show it
    tool_calls    of an assistant
    reasoning     of an assistant: what it thought before its content
    tool_call_id  of a tool: the call whose result this is
    """

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None
    name: str | None = None
    tool_calls: Sequence[ToolCall] = ()
    reasoning: str | None = None
    tool_call_id: str | None = None


@dataclass(frozen=True)
class ToolDefinition:
    """parameters: JSON schema of the arguments; is_strict: calls must follow it exactly."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    is_strict: bool = False


@dataclass(frozen=True)
class ToolChoice:
    """allowed_names: the tools that may be called; empty: all of them."""

    must_call: bool = False
    allowed_names: Sequence[str] = ()
    at_most_one: bool = False


@dataclass(frozen=True)
class ParamNames:
    """What a dialect calls the fields that errors name."""

    messages: str = "messages"
    template_variables: str = "chat_template_kwargs"
    reasoning_effort: str = "reasoning_effort"


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """What the model is shown.

    messages                at least one
    tools                   the tools described to the model
    template_variables      further variables for the chat template, such as enable_thinking
    add_generation_prompt   the prompt ends with the beginning of an assistant's message
    continue_final_message  the prompt ends within the last message, which must be the assistant's
    """

    messages: Sequence[Message]
    tools: Sequence[ToolDefinition] = ()
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    reasoning_effort: str | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    param_names: ParamNames = ParamNames()
