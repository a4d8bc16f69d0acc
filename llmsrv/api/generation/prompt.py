"""From a conversation to the token ids of its prompt, through the model's chat template.

A template that does not know tools gets tools, calls and their results as text, in the format that
the Hermes models made common.
"""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from llmsrv.api.generation import submit
from llmsrv.api.generation.conversation import Conversation
from llmsrv.api.generation.conversation import Message
from llmsrv.api.generation.conversation import ToolDefinition
from llmsrv.api.generation.options import GenerationOptions
from llmsrv.errors import ApiError
from llmsrv.errors import invalid
from llmsrv.registry.service import Service
from llmsrv.text.chat_template import ChatTemplate
from llmsrv.text.chat_template import TEMPLATE_FAILED

# Variables of a template that a request cannot set.
RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
MESSAGE_CHARS = 80  # rendering one message takes as long as tokenising this many characters
TOOLS_PROMPT = """\
You may call one or more functions to assist with the user query. You are given their signatures:
<tools>
{}
</tools>
For each function call, return a JSON object with the function's name and arguments within
<tool_call></tool_call> tags:
<tool_call>
{{"name": <function-name>, "arguments": <arguments-object>}}
</tool_call>"""


async def prompt_ids(
    service: Service, conversation: Conversation, options: GenerationOptions
) -> list[int]:
    """The prompt's token ids.

    Raises ApiError 400 if the model has no chat template, if the template does not know a variable
    or refuses the conversation, or if a message alone is longer than the context.
    """
    template = service.text.template
    if template is None:
        raise _no_template(conversation.param_names.messages)
    texts = [text for message in conversation.messages for text in _texts(message)]
    num_chars = sum(map(len, texts)) + MESSAGE_CHARS * len(texts)
    if num_chars <= submit.INLINE_CHARS and not conversation.tools and not template.is_slow:
        ids = _encode(template, conversation)
    else:
        if options.truncate_prompt_tokens is None:
            longest = max(texts, key=len, default="")
            param = conversation.param_names.messages
            submit.check_fits_context(service, longest, param)
        ids = await asyncio.to_thread(_encode, template, conversation)
    return submit.truncate_prompt(service, options, ids)


def _texts(message: Message) -> list[str]:
    return [message.content or "", *(call.arguments for call in message.tool_calls)]


def _encode(template: ChatTemplate, conversation: Conversation) -> list[int]:
    messages = [_template_message(message) for message in conversation.messages]
    tools = [_template_tool(tool) for tool in conversation.tools]
    if not template.uses_variable("tools"):
        try:
            messages, tools = _tools_as_text(messages, tools), []
        except RecursionError:
            raise invalid("tools", "nested too deeply") from None
    options: dict[str, Any] = {
        "tools": tools or None,
        "add_generation_prompt": conversation.add_generation_prompt,
        "continue_final_message": conversation.continue_final_message,
        "extra": _template_variables(conversation, template),
    }
    try:
        return template.encode(messages, **options)
    except ApiError as error:
        if error.code != TEMPLATE_FAILED or not _arguments_to_strings(messages):
            raise
        return template.encode(messages, **options)


def _template_variables(conversation: Conversation, template: ChatTemplate) -> dict[str, Any]:
    """Further variables for the template, all of them plain values that it knows."""
    variables = dict(conversation.template_variables)
    names = conversation.param_names
    for name, value in variables.items():
        param = f"{names.template_variables}.{name[:64]}"
        if name in RESERVED or not template.uses_variable(name):
            raise invalid(param, "the model's chat template has no such variable")
        if isinstance(value, list | dict):
            raise invalid(param, "expected a string, a number, true, false or null")
    if conversation.reasoning_effort is not None:
        if not template.uses_variable("reasoning_effort"):
            raise ApiError(
                400,
                f"'{names.reasoning_effort}' is not supported by this model, whose chat template "
                "does not know it.",
                param=names.reasoning_effort,
                code="unsupported_parameter",
            )
        variables["reasoning_effort"] = conversation.reasoning_effort
    return variables


# ---- What templates expect


def _template_message(message: Message) -> dict[str, Any]:
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name is not None:
        fields["name"] = message.name
    if message.tool_calls:
        fields["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": _parsed_arguments(call.arguments)},
            }
            for call in message.tool_calls
        ]
    if message.reasoning is not None:
        fields["reasoning_content"] = message.reasoning
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    return fields


def _parsed_arguments(arguments: str) -> Any:
    """An object, which most templates expect; the text itself if it is not JSON."""
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


def _arguments_to_strings(messages: Sequence[dict[str, Any]]) -> bool:
    """Turns the arguments of calls back into strings, which some templates expect; False if there
    are no calls."""
    calls = [call["function"] for message in messages for call in message.get("tool_calls", ())]
    for function in calls:
        if not isinstance(function["arguments"], str):
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    return bool(calls)


def _template_tool(tool: ToolDefinition) -> dict[str, Any]:
    """As transformers passes tools to templates, so without `strict`."""
    parameters = tool.parameters or {"type": "object", "properties": {}}
    function = {"name": tool.name, "description": tool.description or "", "parameters": parameters}
    return {"type": "function", "function": function}


# ---- Templates that do not know tools


def _tools_as_text(
    messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The conversation with its tools, calls and results as text."""
    plain: list[dict[str, Any]] = []
    follows_result = False
    for message in messages:
        is_result = message["role"] == "tool"
        if is_result:
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if follows_result:  # many templates require user and assistant to alternate
                plain[-1]["content"] += "\n" + text
            else:
                plain.append({"role": "user", "content": text})
        else:
            calls = [_call_as_text(call["function"]) for call in message.pop("tool_calls", ())]
            content = "\n".join([*filter(None, [message["content"]]), *calls])
            plain.append(message | {"content": content})
        follows_result = is_result
    if tools:
        tools_prompt = TOOLS_PROMPT.format("\n".join(json.dumps(tool) for tool in tools))
        if plain[0]["role"] == "system":
            plain[0]["content"] += "\n\n" + tools_prompt
        else:
            plain.insert(0, {"role": "system", "content": tools_prompt})
    return plain


def _call_as_text(function: dict[str, Any]) -> str:
    return f"<tool_call>\n{json.dumps(function, ensure_ascii=False)}\n</tool_call>"


def _no_template(param: str) -> ApiError:
    return ApiError(
        400,
        "This model has no chat template; start the server with --chat-template FILE, "
        "or use /v1/completions.",
        param=param,
        code="no_chat_template",
    )
