"""From a chat request to the neutral conversation, with OpenAI's names in its errors.

`developer` is the newer name of `system`; content in parts becomes one string.
"""

from typing import Any

from llmsrv.api.generation.conversation import Conversation
from llmsrv.api.generation.conversation import Message
from llmsrv.api.generation.conversation import ToolCall
from llmsrv.api.generation.conversation import ToolChoice
from llmsrv.api.generation.conversation import ToolDefinition
from llmsrv.api.openai import schema
from llmsrv.api.openai.schema import ChatCompletionRequest
from llmsrv.errors import ApiError
from llmsrv.errors import invalid
from llmsrv.errors import missing


def conversation_of(body: ChatCompletionRequest) -> Conversation:
    """ApiError 400 naming the message or field that is invalid."""
    return Conversation(
        messages=[_message(message, i) for i, message in enumerate(body.messages)],
        tools=[] if body.tool_choice == "none" else [_tool(tool) for tool in body.tools or ()],
        template_variables=body.chat_template_kwargs or {},
        reasoning_effort=body.reasoning_effort,
        add_generation_prompt=_adds_generation_prompt(body),
        continue_final_message=bool(body.continue_final_message),
    )


def tool_choice_of(body: ChatCompletionRequest) -> ToolChoice:
    """With "none", conversation_of() leaves out the tools."""
    must_call, allowed_names = _required_and_allowed(body.tool_choice)
    is_named = isinstance(body.tool_choice, schema.NamedToolChoice)
    return ToolChoice(must_call, allowed_names, is_named or body.parallel_tool_calls is False)


def _required_and_allowed(choice: Any) -> tuple[bool, list[str]]:
    match choice:
        case schema.NamedToolChoice():
            return True, [choice.function.name]
        case schema.AllowedToolsChoice():
            allowed = choice.allowed_tools
            return allowed.mode == "required", [tool.function.name for tool in allowed.tools]
    return choice == "required", []


def _tool(tool: schema.Tool) -> ToolDefinition:
    function = tool.function
    return ToolDefinition(
        function.name, function.description, function.parameters, bool(function.strict)
    )


def _adds_generation_prompt(body: ChatCompletionRequest) -> bool:
    if not body.continue_final_message:
        return body.add_generation_prompt is not False
    if body.add_generation_prompt:
        reason = "it is not allowed together with 'add_generation_prompt'"
    elif body.messages[-1].role != "assistant":
        reason = "the last message must be the assistant's"
    else:
        return False
    raise invalid("continue_final_message", reason)


# ---- Messages


def _message(message: schema.Message, index: int) -> Message:
    content = message.content
    if not isinstance(content, str):
        content = _joined_content(message, f"messages[{index}]")
    is_assistant, is_tool = message.role == "assistant", message.role == "tool"
    if is_tool and message.tool_call_id is None:
        raise missing(f"messages[{index}].tool_call_id")
    return Message(
        role="system" if message.role == "developer" else message.role,
        content=content,
        name=message.name,
        tool_calls=_tool_calls(message) if is_assistant else (),
        reasoning=(message.reasoning_content or message.reasoning) if is_assistant else None,
        tool_call_id=message.tool_call_id if is_tool else None,
    )


def _tool_calls(message: schema.Message) -> list[ToolCall]:
    return [
        ToolCall(call.id, call.function.name, call.function.arguments)
        for call in message.tool_calls or ()
    ]


def _joined_content(message: schema.Message, param: str) -> str | None:
    """The text of content that is missing or in parts."""
    if isinstance(message.content, list):
        return "".join([_text(part, param, i) for i, part in enumerate(message.content)])
    if message.role != "assistant" or not (message.tool_calls or message.refusal):
        raise missing(f"{param}.content")
    return message.refusal


def _text(part: schema.ContentPart, param: str, index: int) -> str:
    text = part.refusal if part.type == "refusal" else part.text
    if part.type not in ("text", "refusal"):
        raise _unsupported_part(part, f"{param}.content[{index}].type")
    if text is None:
        raise missing(f"{param}.content[{index}].{part.type}")
    return text


def _unsupported_part(part: schema.ContentPart, param: str) -> ApiError:
    return ApiError(
        400,
        f"Invalid value for '{param}': expected 'text', the only type that this model takes, but "
        f"got '{part.type[:64]}'.",
        param=param,
        code="unsupported_value",
    )
