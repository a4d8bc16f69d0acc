"""From a conversation to the token ids of its prompt, through the model's chat template."""

import json
from typing import Any

from llmsrv.api.generation import submit
from llmsrv.api.generation.conversation import Conversation
from llmsrv.api.generation.conversation import Message
from llmsrv.api.generation.options import GenerationOptions
from llmsrv.api.generation.template_messages import template_input
from llmsrv.api.generation.tools import tool_call_format
from llmsrv.errors import ApiError
from llmsrv.errors import invalid
from llmsrv.registry.service import Service
from llmsrv.text.chat_template import ChatTemplate

# Variables of a template that a request cannot set.
RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
MESSAGE_CHARS = 80  # rendering one message takes as long as tokenising this many characters


async def prompt_ids(
    service: Service, conversation: Conversation, options: GenerationOptions
) -> list[int]:
    """The prompt's token ids.

    Raises ApiError 400 if the model has no chat template, if the template refuses a
    variable or the conversation, or if messages or tools are longer than the context.
    """
    template = service.text.template
    if template is None:
        raise _no_template(conversation.param_names.messages)
    texts = [text for message in conversation.messages for text in _texts(message)]
    num_chars = sum(map(len, texts)) + MESSAGE_CHARS * len(texts)
    if num_chars <= submit.INLINE_CHARS and not conversation.tools and not template.is_slow:
        ids = _encode(service, template, conversation)
    else:
        # A whole conversation is rendered before it can be truncated, so this holds there too.
        submit.check_fits_context(
            service, sum(map(len, texts)), conversation.param_names.messages
        )
        ids = await submit.tokenise_in_thread(_encode_large, service, template, conversation)
    return submit.truncate_prompt(service, options, ids)


def _texts(message: Message) -> list[str]:
    return [message.content or "", *(call.arguments for call in message.tool_calls)]


def _encode_large(
    service: Service, template: ChatTemplate, conversation: Conversation
) -> list[int]:
    try:
        sizes = [
            len(tool.description or "") + len(json.dumps(tool.parameters, ensure_ascii=False))
            for tool in conversation.tools
        ]
    except RecursionError:
        raise invalid("tools", "nested too deeply") from None
    submit.check_fits_context(service, sum(sizes), "tools")
    return _encode(service, template, conversation)


def _encode(service: Service, template: ChatTemplate, conversation: Conversation) -> list[int]:
    variables = _template_variables(conversation, template)
    try:
        takes = template_input(conversation, template.facts, tool_call_format(service))
    except RecursionError:
        raise invalid("tools", "nested too deeply") from None
    return template.encode(
        takes.messages,
        tools=takes.tools,
        add_generation_prompt=conversation.add_generation_prompt,
        continue_final_message=conversation.continue_final_message,
        extra=variables,
    )


def _template_variables(conversation: Conversation, template: ChatTemplate) -> dict[str, Any]:
    """Further variables for the template, all of them plain values.  It may not know all of them:
    clients send the same ones to every model."""
    variables = dict(conversation.template_variables)
    names = conversation.param_names
    for name, value in variables.items():
        param = f"{names.template_variables}.{name[:64]}"
        if name in RESERVED:
            raise invalid(param, "a request cannot set this variable of the chat template")
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


def _no_template(param: str) -> ApiError:
    return ApiError(
        400,
        "This model has no chat template; start the server with --chat-template FILE, "
        "or use /v1/completions.",
        param=param,
        code="no_chat_template",
    )
