"""POST /v1/chat/completions: messages in, an assistant's message out, whole or as a stream.

Source: OpenAI API reference, "Chat Completions".
"""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import orjson

from llmsrv.api.decode import BodyDecoder
from llmsrv.api.generation.answer_parser import ToolCallDelta
from llmsrv.api.generation.chat_turn import ChatTurn
from llmsrv.api.generation.chat_turn import RunningTurn
from llmsrv.api.generation.conversation import Conversation
from llmsrv.api.generation.output import Delta
from llmsrv.api.generation.respond import respond
from llmsrv.api.generation.submit import num_alternatives
from llmsrv.api.generation.submit import tenant_of
from llmsrv.api.openai.checks import check_shared_fields
from llmsrv.api.openai.conversation import conversation_of
from llmsrv.api.openai.conversation import tool_choice_of
from llmsrv.api.openai.logprobs import LogprobFormatter
from llmsrv.api.openai.logprobs import are_large
from llmsrv.api.openai.logprobs import prompt_logprobs
from llmsrv.api.openai.reply import Reply
from llmsrv.api.openai.schema import ChatCompletionRequest
from llmsrv.api.openai.schema import IGNORED
from llmsrv.api.openai.schema import UNSUPPORTED
from llmsrv.api.openai.schema import with_default_model
from llmsrv.api.openai.structured import wanted_grammar
from llmsrv.asgi.request import Request
from llmsrv.asgi.response import Response
from llmsrv.asgi.sse import EventStream
from llmsrv.config import Config
from llmsrv.errors import invalid
from llmsrv.registry.models import Models
from llmsrv.registry.service import Service
from llmsrv.text.tokenizer import Tokenizer


class ChatCompletions:
    def __init__(self, models: Models) -> None:
        self._models = models
        body_type = with_default_model(ChatCompletionRequest, models.default_name)
        self._decoder = BodyDecoder(body_type, UNSUPPORTED, IGNORED)

    async def __call__(self, request: Request) -> Response | EventStream:
        tenant = tenant_of(request)
        body = await self._decoder.read_for_model(request, self._models, tenant)
        _check(body, self._models.config)
        service = self._models.find(body.model, tenant)
        body.top_logprobs = num_alternatives(service, body.top_logprobs)
        body.prompt_logprobs = num_alternatives(service, body.prompt_logprobs)
        turn = chat_turn(body, service.text.tokenizer)
        running = await turn.start(request, service)
        answer = ChatAnswer(service, body, running, _echo(body, turn.conversation))
        return await respond(request, running.job, answer, is_stream=bool(body.stream))


def _check(body: ChatCompletionRequest, config: Config) -> None:
    check_shared_fields(body, config)
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs", "it is only allowed when 'logprobs' is true")
    body.max_tokens = body.max_completion_tokens or body.max_tokens


def _echo(body: ChatCompletionRequest, conversation: Conversation) -> str:
    """What an answer begins with: vLLM's `echo` repeats an assistant's last message."""
    last = conversation.messages[-1]
    return last.content or "" if body.echo and last.role == "assistant" else ""


def chat_turn(body: ChatCompletionRequest, tokenizer: Tokenizer) -> ChatTurn:
    """The request in neutral terms; ApiError 400 naming what is invalid in it."""
    tool_choice = tool_choice_of(body)
    return ChatTurn(
        conversation=conversation_of(body),
        options=body,
        tool_choice=tool_choice,
        num_logprobs=(body.top_logprobs or 0) if body.logprobs else -1,
        # An answer that must call tools has no other form.
        answer_format=None if tool_choice.must_call else wanted_grammar(body, tokenizer),
    )


class ChatAnswer:
    """One turn's answer in OpenAI's shape.  echo: what its content begins with."""

    def __init__(
        self, service: Service, body: ChatCompletionRequest, turn: RunningTurn, echo: str = ""
    ) -> None:
        # Not the body, and ids only if they are wanted: thousands of streams may wait.
        self._tokenizer = service.text.tokenizer
        self._job = turn.job
        self._prompt_ids = turn.prompt_ids if body.return_token_ids else None
        self._num_prompt_logprobs = body.prompt_logprobs
        self._has_logprobs = bool(body.logprobs)
        self._num_alternatives = body.top_logprobs or 0
        self._logprobs = LogprobFormatter(
            self._tokenizer, self._num_alternatives, bool(body.return_tokens_as_token_ids)
        )
        self._is_thinking = turn.is_thinking is not None
        self._has_reasoning = body.include_reasoning is not False
        self._echo = echo
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        self._reply = Reply(service, body, turn.job, kind, "chatcmpl")

    async def whole(self) -> bytes:
        choices = await self._job.collect()
        if self._num_prompt_logprobs is not None or are_large(choices, self._num_alternatives):
            return await asyncio.to_thread(self._whole_body, choices)
        return self._whole_body(choices)

    def events(self) -> AsyncGenerator[bytes, None]:
        first = {"role": "assistant", "content": self._echo}
        indices = range(self._job.num_choices)
        return self._reply.events(
            self._chunks,
            (self._chunk(Delta(i), first) for i in indices),
            is_slow=lambda delta: are_large([delta], self._num_alternatives),
        )

    def _whole_body(self, choices: list[Delta]) -> bytes:
        fields = self._reply.whole([self._choice(choice) for choice in choices])
        if self._num_prompt_logprobs is not None:
            tokens = self._job.prompt_logprobs[0]
            fields["prompt_logprobs"] = prompt_logprobs(
                self._tokenizer, tokens, self._num_prompt_logprobs
            )
        if self._prompt_ids is not None:
            fields["prompt_token_ids"] = self._prompt_ids
        return orjson.dumps(fields)

    def _choice(self, choice: Delta) -> dict[str, Any]:
        message = message_of(choice, self._is_thinking and self._has_reasoning)
        if self._echo:
            message["content"] = self._echo + (message["content"] or "")
        fields = {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs.chat(choice.logprobs) if self._has_logprobs else None,
            "finish_reason": choice.finish_reason,
        }
        if self._prompt_ids is not None:
            fields["token_ids"] = choice.token_ids
        return fields

    def _chunks(self, delta: Delta) -> list[bytes]:
        """One chunk per kind of part, then one with the finish_reason.  The first has all token ids
        and log-probabilities."""
        if not self._has_reasoning:
            delta.reasoning = ""
        parts = message_deltas(delta)
        if not parts and (delta.logprobs or (delta.token_ids and self._prompt_ids is not None)):
            parts = [{}]
        chunks = [self._chunk(delta, part) for part in parts[:1]]
        chunks += [self._chunk(Delta(delta.index), part) for part in parts[1:]]
        if delta.finish_reason is not None:
            chunks.append(self._chunk(Delta(delta.index), {}, delta.finish_reason))
        return chunks

    def _chunk(
        self, delta: Delta, part: dict[str, Any], finish_reason: str | None = None
    ) -> bytes:
        has_logprobs = self._has_logprobs and delta.logprobs
        choice = {
            "index": delta.index,
            "delta": part,
            "logprobs": self._logprobs.chat(delta.logprobs) if has_logprobs else None,
            "finish_reason": finish_reason,
        }
        if self._prompt_ids is None:
            return self._reply.chunk(choice)
        choice["token_ids"] = delta.token_ids
        prompt = {"prompt_token_ids": self._prompt_ids} if "role" in part else {}
        return self._reply.chunk(choice, **prompt)


def message_of(choice: Delta, has_reasoning: bool) -> dict[str, Any]:
    """A whole choice as an assistant's message."""
    message: dict[str, Any] = {
        "role": "assistant",
        "content": choice.text if choice.text or not choice.tool_calls else None,
        "refusal": None,
        "annotations": [],
    }
    if has_reasoning:
        message["reasoning_content"] = choice.reasoning or None
    if choice.tool_calls:
        message["tool_calls"] = [_tool_call(call) for call in choice.tool_calls]
    return message


def message_deltas(delta: Delta) -> list[dict[str, Any]]:
    """The pieces of the message that a delta adds, one per kind."""
    parts: list[dict[str, Any]] = []
    if delta.reasoning:
        parts.append({"reasoning_content": delta.reasoning})
    if delta.text:
        parts.append({"content": delta.text})
    if delta.tool_calls:
        parts.append({"tool_calls": [_tool_call_delta(call) for call in delta.tool_calls]})
    return parts


def _tool_call_delta(call: ToolCallDelta) -> dict[str, Any]:
    if call.id is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    return {"index": call.index, **_tool_call(call)}


def _tool_call(call: ToolCallDelta) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}
