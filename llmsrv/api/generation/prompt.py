"""From the messages of a chat request to the ids of its prompt.

What clients send is translated into what templates know: the content one string, `developer` the
older `system`, the arguments of calls objects.  A template that knows nothing of tools gets them as
text, in the words that the Hermes models made common.
"""

import asyncio
import json
from typing import Any

from llmsrv.api.generation import submit
from llmsrv.api.openai.schema import ChatCompletionRequest
from llmsrv.api.openai.schema import ContentPart
from llmsrv.api.openai.schema import Message
from llmsrv.api.openai.schema import Tool
from llmsrv.errors import ApiError
from llmsrv.errors import invalid
from llmsrv.errors import missing
from llmsrv.registry.service import Service
from llmsrv.text.chat_template import ChatTemplate
from llmsrv.text.chat_template import TEMPLATE_FAILED

# A template's variables that are no request's to set.
RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
MESSAGE_CHARS = 80  # to render a message takes as long as to tokenise so many
TOOLS_TOLD = """\
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
    service: Service, asked: ChatCompletionRequest, tools: list[Tool]
) -> list[int]:
    """The prompt of a request; `tools` are those to tell the model of.

    Raises ApiError 400 naming the message that cannot be, or with the template's own words.
    """
    template = service.text.template
    if template is None:
        raise _no_template()
    texts = [text for message in asked.messages for text in _texts(message)]
    num_chars = sum(map(len, texts)) + MESSAGE_CHARS * len(texts)
    if num_chars <= submit.INLINE_CHARS and not tools and not template.is_slow:
        ids = _encode(template, asked, tools)
    else:
        if asked.truncate_prompt_tokens is None:
            longest = max(texts, key=len, default="")
            submit.refuse_too_long(service, service.text.tokenizer, longest, "messages")
        ids = await asyncio.to_thread(_encode, template, asked, tools)
    return submit.truncated(service, asked, ids)


def _encode(
    template: ChatTemplate, asked: ChatCompletionRequest, tools: list[Tool]
) -> list[int]:
    messages = [_plain(message, i) for i, message in enumerate(asked.messages)]
    told = [_described(tool) for tool in tools]
    if not template.knows("tools"):
        try:
            messages, told = _as_text(messages, told), []
        except RecursionError:
            raise invalid("tools", "nested too deeply") from None
    options: dict[str, Any] = {
        "tools": told or None,
        "add_generation_prompt": _adds_generation_prompt(asked),
        "continue_final_message": bool(asked.continue_final_message),
        "extra": _template_variables(asked, template),
    }
    try:
        return template.encode(messages, **options)
    except ApiError as error:
        if error.code != TEMPLATE_FAILED or not _spell_arguments(messages):
            raise
        return template.encode(messages, **options)


def _texts(message: Message) -> list[str]:
    content = message.content
    texts = [content or ""] if not isinstance(content, list) else [p.text or "" for p in content]
    return texts + [call.function.arguments for call in message.tool_calls or ()]


def _adds_generation_prompt(asked: ChatCompletionRequest) -> bool:
    if not asked.continue_final_message:
        return asked.add_generation_prompt is not False
    if asked.add_generation_prompt:
        message = "it is not allowed together with 'add_generation_prompt'"
    elif asked.messages[-1].role != "assistant":
        message = "the last message must be the assistant's"
    else:
        return False
    raise invalid("continue_final_message", message)


def _template_variables(asked: ChatCompletionRequest, template: ChatTemplate) -> dict[str, Any]:
    """What the request sets of the template's own variables, all of them plain values."""
    variables = dict(asked.chat_template_kwargs or {})
    for name, value in variables.items():
        where = f"chat_template_kwargs.{name[:64]}"
        if name in RESERVED or not template.knows(name):
            raise invalid(where, "the model's chat template has no such variable")
        if isinstance(value, list | dict):
            raise invalid(where, "expected a string, a number, true, false or null")
    if asked.reasoning_effort is not None:
        if not template.knows("reasoning_effort"):
            raise ApiError(
                400,
                "'reasoning_effort' is not supported by this model, whose chat template does not "
                "know it.",
                param="reasoning_effort",
                code="unsupported_parameter",
            )
        variables["reasoning_effort"] = asked.reasoning_effort
    return variables


# ---- One message


def _plain(message: Message, index: int) -> dict[str, Any]:
    """A message as templates know it."""
    where = f"messages[{index}]"
    plain: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": _content(message, where),
    }
    if message.name is not None:
        plain["name"] = message.name
    if message.role == "assistant" and message.tool_calls:
        plain["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": _object_of(call.function.arguments),
                },
            }
            for call in message.tool_calls
        ]
    if message.role == "assistant" and message.reasoning_content is not None:
        plain["reasoning_content"] = message.reasoning_content
    if message.role == "tool":
        if message.tool_call_id is None:
            raise missing(f"{where}.tool_call_id")
        plain["tool_call_id"] = message.tool_call_id
    return plain


def _content(message: Message, where: str) -> str | None:
    content = message.content
    if isinstance(content, str):
        return content
    if content is not None:
        parts = enumerate(content)
        return "".join(_text(part, f"{where}.content[{j}]") for j, part in parts)
    if message.role != "assistant" or not (message.tool_calls or message.refusal):
        raise missing(f"{where}.content")
    return message.refusal


def _text(part: ContentPart, where: str) -> str:
    if part.type not in ("text", "refusal"):
        raise ApiError(
            400,
            f"Invalid value for '{where}.type': expected 'text', the only type that this model "
            f"takes, but got '{part.type[:64]}'.",
            param=f"{where}.type",
            code="unsupported_value",
        )
    text = part.text if part.type == "text" else part.refusal
    if text is None:
        raise missing(f"{where}.{part.type}")
    return text


def _spell_arguments(messages: list[dict[str, Any]]) -> bool:
    """Makes the arguments of calls strings again, as some templates expect them; whether there were
    any."""
    calls = [call["function"] for message in messages for call in message.get("tool_calls", ())]
    for function in calls:
        if not isinstance(function["arguments"], str):
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    return bool(calls)


def _object_of(arguments: str) -> Any:
    """The arguments of an earlier call as templates expect them; as they are where they are no
    JSON."""
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


# ---- Templates that know nothing of tools


def _as_text(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with tools, calls and their results as text."""
    plain: list[dict[str, Any]] = []
    follows_result = False
    for message in messages:
        is_result = message["role"] == "tool"
        if is_result:
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if follows_result:  # templates like turns to alternate
                plain[-1]["content"] += "\n" + text
            else:
                plain.append({"role": "user", "content": text})
        else:
            calls = [_call_as_text(call["function"]) for call in message.pop("tool_calls", ())]
            content = "\n".join([*filter(None, [message["content"]]), *calls])
            plain.append(message | {"content": content})
        follows_result = is_result
    if tools:
        told = TOOLS_TOLD.format("\n".join(json.dumps(tool) for tool in tools))
        if plain[0]["role"] == "system":
            plain[0]["content"] += "\n\n" + told
        else:
            plain.insert(0, {"role": "system", "content": told})
    return plain


def _call_as_text(function: dict[str, Any]) -> str:
    return f"<tool_call>\n{json.dumps(function, ensure_ascii=False)}\n</tool_call>"


def _described(tool: Tool) -> dict[str, Any]:
    """As transformers gives tools to templates.  `strict` is the server's affair."""
    function = tool.function
    described = {"name": function.name, "description": function.description or ""}
    parameters = function.parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": described | {"parameters": parameters}}


# ---- Errors


def _no_template() -> ApiError:
    return ApiError(
        400,
        "This model has no chat template; start the server with --chat-template FILE, "
        "or use /v1/completions.",
        param="messages",
        code="no_chat_template",
    )
