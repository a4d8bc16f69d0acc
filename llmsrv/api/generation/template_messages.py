"""Translates a conversation into messages that the chat template accepts.

text/template_probe.py detected at load what the template supports.  Each function here rewrites one
thing that some templates do not support, and is skipped for those that do.  A template that does
not know tools gets tools, calls and their results as text, in the format that the Hermes models
made common.  One that describes tools, but renders no calls, gets the calls as text in the format
in which its model writes them.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
from typing import Any

from llmsrv.api.generation.conversation import Conversation
from llmsrv.api.generation.conversation import Message
from llmsrv.api.generation.conversation import ToolCall
from llmsrv.api.generation.conversation import ToolDefinition
from llmsrv.text import nested_json
from llmsrv.text.marked_text import MarkedText
from llmsrv.text.template_probe import Arguments
from llmsrv.text.template_probe import CallIds
from llmsrv.text.template_probe import TemplateFacts
from llmsrv.text.tool_calls.formats import FORMATS
from llmsrv.text.tool_calls.parser import ToolCallFormat
from llmsrv.text.tool_calls.values import arguments_object

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
MESSAGE_SEPARATOR = "\n\n"  # where two messages become one
NINE_CHARACTERS = re.compile("[a-zA-Z0-9]{9}")


@dataclass(frozen=True)
class TemplateInput:
    """What a template is rendered with."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None


def template_input(
    conversation: Conversation, facts: TemplateFacts, format: ToolCallFormat
) -> TemplateInput:
    """format: of calls, if the template describes tools.

    Raises RecursionError for tools and arguments that are nested too deeply."""
    messages = list(conversation.messages)
    tools = [_template_tool(tool) for tool in conversation.tools]
    if not facts.takes_late_system or not facts.has_system_role:
        messages = _with_one_system_message(messages)
    if not facts.has_tools:
        messages = _calls_as_text(messages, FORMATS["hermes"], has_results=False)
        messages, tools = _tools_as_text(messages, tools), []
    elif not facts.has_calls:
        messages = _calls_as_text(messages, format, facts.has_results)
    if tools and facts.needs_system_for_tools and messages[0].role != "system":
        messages = [Message("system", ""), *messages]
    if not facts.has_system_role:
        messages = _system_in_user_message(messages)
    elif not facts.keeps_system_after_result and messages[-1].role != "user":
        messages = _system_in_user_message(messages, is_last=True)
    if not facts.takes_calls_with_content:
        messages = _content_before_calls(messages)
    if not facts.takes_several_calls:
        messages = _one_call_per_message(messages)
    if not facts.takes_user_after_result:
        messages = _answer_after_results(messages)
    if not facts.takes_repeated_roles:
        messages = _alternating(messages)
    messages = _with_call_ids(messages, facts.call_ids)
    no_tools: list[dict[str, Any]] | None = [] if facts.needs_tools_list else None
    return TemplateInput([_template_message(m, facts) for m in messages], tools or no_tools)


# ---- System messages


def _with_one_system_message(messages: Sequence[Message]) -> list[Message]:
    """Joins all system messages at the beginning, in order."""
    system = [message for message in messages if message.role == "system"]
    others = [message for message in messages if message.role != "system"]
    return [*([_joined(system)] if system else []), *others]


def _system_in_user_message(messages: list[Message], is_last: bool = False) -> list[Message]:
    """Moves the system message into the first, or last, user message."""
    if messages[0].role != "system":
        return messages
    system, *others = messages
    places = [i for i, message in enumerate(others) if message.role == "user"]
    if not is_last and places and places[0] > 0:
        places = []
    if not places:
        return [replace(system, role="user"), *others]
    place = places[-1] if is_last else places[0]
    content = _joined([system, others[place]]).content
    others[place] = replace(others[place], content=content)
    return others


def _joined(messages: Sequence[Message]) -> Message:
    texts = [message.content for message in messages if message.content]
    return replace(messages[0], content=MESSAGE_SEPARATOR.join(texts))


# ---- Calls and their results


def _content_before_calls(messages: Sequence[Message]) -> list[Message]:
    """Splits messages with content and calls: first the content, then the calls."""
    split: list[Message] = []
    for message in messages:
        if message.tool_calls and message.content:
            split.append(replace(message, tool_calls=()))
            message = replace(message, content=None, reasoning=None)
        split.append(message)
    return split


def _one_call_per_message(messages: Sequence[Message]) -> list[Message]:
    """Splits several calls in a message, and the results after it, into call, result, call,
    result."""
    split: list[Message] = []
    position = 0
    while position < len(messages):
        message = messages[position]
        position += 1
        results: list[Message] = []
        while message.tool_calls and position < len(messages) and _is_result(messages[position]):
            results.append(messages[position])
            position += 1
        split += _calls_and_results(message, results) if message.tool_calls else [message]
    return split


def _calls_and_results(message: Message, results: list[Message]) -> Iterator[Message]:
    for call in message.tool_calls:
        yield replace(message, tool_calls=[call])
        message = replace(message, content=None, reasoning=None)
        own = next((result for result in results if result.tool_call_id == call.id), None)
        if own is not None:
            results.remove(own)
            yield own
    yield from results


def _answer_after_results(messages: Sequence[Message]) -> list[Message]:
    """Puts a blank answer between a result and a user message.  Some templates refuse an empty
    one."""
    answered: list[Message] = []
    for message in messages:
        if message.role == "user" and answered and _is_result(answered[-1]):
            answered.append(Message("assistant", " "))
        answered.append(message)
    return answered


def _alternating(messages: Sequence[Message]) -> list[Message]:
    """Merges consecutive messages of one role, except calls and results."""
    merged: list[Message] = []
    for message in messages:
        last = merged[-1] if merged else None
        is_plain = message.role != "tool" and not message.tool_calls
        if last is not None and last.role == message.role and is_plain and not last.tool_calls:
            merged[-1] = _joined([last, message])
        else:
            merged.append(message)
    return merged


def _is_result(message: Message) -> bool:
    return message.role == "tool"


def _with_call_ids(messages: Sequence[Message], form: CallIds) -> list[Message]:
    """Rewrites ids in the given form, alike in calls and results; names each result after its
    call."""
    ids: dict[str | None, str] = {}
    names: dict[str | None, str] = {}
    changed: list[Message] = []
    num_calls = 0
    for message in messages:
        calls = []
        for call in message.tool_calls:
            ids[call.id], names[call.id] = _call_id(call, num_calls, form), call.name
            calls.append(replace(call, id=ids[call.id]))
            num_calls += 1
        if _is_result(message):
            old = message.tool_call_id
            new = ids.get(old) or _call_id(ToolCall(old or "", "", ""), num_calls, form)
            message = replace(message, tool_call_id=new, name=message.name or names.get(old))
        changed.append(replace(message, tool_calls=calls) if calls else message)
    return changed


def _call_id(call: ToolCall, index: int, form: CallIds) -> str:
    if form is CallIds.NINE and not NINE_CHARACTERS.fullmatch(call.id):
        return hashlib.sha256(call.id.encode()).hexdigest()[:9]
    if form is CallIds.FUNCTION and call.name:
        return f"functions.{call.name}:{index}"
    return call.id


# ---- Templates that do not know tools, or no calls


def _calls_as_text(
    messages: Sequence[Message], format: ToolCallFormat, has_results: bool
) -> list[Message]:
    """Calls become text of the assistant, and results, unless has_results, text of the user."""
    plain: list[Message] = []
    follows_result = False
    for message in messages:
        is_result = _is_result(message) and not has_results
        if is_result:
            text = f"<tool_response>\n{message.content}\n</tool_response>"
            if follows_result:  # many templates require user and assistant to alternate
                plain[-1] = replace(plain[-1], content=f"{plain[-1].content}\n{text}")
            else:
                plain.append(Message("user", text))
        else:
            plain.append(_with_calls_as_text(message, format) if message.tool_calls else message)
        follows_result = is_result
    return plain


def _with_calls_as_text(message: Message, format: ToolCallFormat) -> Message:
    calls = [(call.name, _parsed_arguments(call.arguments)) for call in message.tool_calls]
    before = [message.content, "\n"] if message.content else []
    content = MarkedText([*before, *format.written(calls)])
    return replace(message, content=content, tool_calls=())


def _tools_as_text(
    messages: Sequence[Message], tools: Sequence[dict[str, Any]]
) -> list[Message]:
    if not tools:
        return list(messages)
    signatures = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    prompt = Message("system", TOOLS_PROMPT.format(signatures))
    if messages[0].role == "system":
        return [_joined([messages[0], prompt]), *messages[1:]]
    return [prompt, *messages]


# ---- Messages and tools as templates expect them


def _template_message(message: Message, facts: TemplateFacts) -> dict[str, Any]:
    content: Any = message.content or ""
    if message.tool_calls and not content and facts.takes_null_content:
        content = None
    elif facts.needs_parts:
        content = [{"type": "text", "text": content}]
    fields: dict[str, Any] = {"role": message.role, "content": content}
    if message.name is not None:
        fields["name"] = message.name
    if message.tool_calls:
        fields["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": _arguments(call.arguments, facts)},
            }
            for call in message.tool_calls
        ]
    if message.reasoning is not None:
        fields["reasoning_content"] = message.reasoning
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    return fields


def _arguments(text: str, facts: TemplateFacts) -> Any:
    """In the form that the template expects.  If that is an object, other values become one."""
    arguments = _parsed_arguments(text)
    if facts.arguments is Arguments.STRING:
        is_text = isinstance(arguments, str)
        return arguments if is_text else json.dumps(arguments, ensure_ascii=False)
    return arguments_object(arguments) if facts.arguments is Arguments.OBJECT else arguments


def _parsed_arguments(text: str) -> Any:
    """The parsed object; the text itself if it is not JSON, as for a call that was cut off."""
    if not text.strip():
        return {}
    try:
        arguments = nested_json.loads(text)
    except (ValueError, RecursionError):
        return text
    return {} if arguments is None else arguments


def _template_tool(tool: ToolDefinition) -> dict[str, Any]:
    """As transformers passes tools to templates, so without `strict`."""
    parameters = tool.parameters or {"type": "object", "properties": {}}
    function = {"name": tool.name, "description": tool.description or "", "parameters": parameters}
    return {"type": "function", "function": function}
