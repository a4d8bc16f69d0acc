"""POST /v1/chat/completions: messages in, an assistant's message out, whole or as a stream.

Source: OpenAI API reference, "Chat Completions".
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
import orjson

from llmsrv.api import decode
from llmsrv.api import generate
from llmsrv.api.generate import Job
from llmsrv.api.models import Models
from llmsrv.api.output import TokenEntry
from llmsrv.api.schema import ChatCompletionRequest
from llmsrv.api.schema import ContentPart
from llmsrv.api.schema import Message
from llmsrv.api.service import Service
from llmsrv.asgi.request import Request
from llmsrv.asgi.response import Response
from llmsrv.asgi.sse import EventStream
from llmsrv.errors import ApiError
from llmsrv.text.tokenizer import Tokenizer


class ChatCompletions:
    def __init__(self, models: Models) -> None:
        self._models = models
        self._decoder = msgspec.json.Decoder(ChatCompletionRequest)

    async def __call__(self, request: Request) -> Response | EventStream:
        asked = await decode.read(request, self._decoder, self._models.body_limit_bytes)
        _check(asked)
        service = self._models.find(asked.model)
        prompt_ids = await self._encode(service, asked)
        max_tokens = generate.output_limit(
            service,
            len(prompt_ids),
            asked.max_completion_tokens or asked.max_tokens,
            None,
            "messages",
        )
        num_logprobs = (asked.top_logprobs or 0) if asked.logprobs else -1
        job = Job(
            service,
            service.text.tokenizer,
            asked,
            [prompt_ids],
            [max_tokens],
            num_logprobs,
            generate.tenant_of(request),
        )
        await generate.start(request, job)
        answer = _Answer(service, service.text.tokenizer, asked, job)
        if asked.stream:
            return EventStream(answer.events(), on_end=job.end)
        async with request.cancel_on_disconnect():
            return Response(body=await answer.whole())

    async def _encode(self, service: Service, asked: ChatCompletionRequest) -> list[int]:
        model = service.text
        if model.template is None:
            raise ApiError(
                400,
                "This model has no chat template; start the server with --chat-template FILE, "
                "or use /v1/completions.",
                param="messages",
                code="no_chat_template",
            )
        messages = [_plain(message, i) for i, message in enumerate(asked.messages)]
        num_chars = sum(len(message["content"]) for message in messages)
        if num_chars <= generate.INLINE_CHARS:
            return model.template.encode(messages)
        longest = max((message["content"] for message in messages), key=len)
        generate.refuse_too_long(service, model.tokenizer, longest, "messages")
        return await asyncio.to_thread(model.template.encode, messages)


class _Answer:
    """One request's answer in OpenAI's shape."""

    def __init__(
        self, service: Service, tokenizer: Tokenizer, asked: ChatCompletionRequest, job: Job
    ) -> None:
        self._tokenizer = tokenizer
        self._job = job
        self._with_logprobs = bool(asked.logprobs)
        self._token_ids_as_text = bool(asked.return_tokens_as_token_ids)
        self._include_usage = generate.wants_usage(asked)
        kind = "chat.completion.chunk" if asked.stream else "chat.completion"
        self._head = generate.head(service, asked.model, kind, "chatcmpl")

    async def whole(self) -> bytes:
        """The answer as one object, when every choice has ended."""
        choices = [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": self._logprobs(choice.entries),
                "finish_reason": choice.finish_reason,
            }
            for choice in await self._job.whole()
        ]
        return orjson.dumps(self._head | {"choices": choices, "usage": self._job.usage()})

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as the payloads of server-sent events."""
        for output in self._job.outputs:
            yield self._chunk(output.index, {"role": "assistant", "content": ""}, None, None)
        async with aclosing(self._job.deltas()) as deltas:
            async for delta in deltas:
                if delta.text or delta.entries:
                    logprobs = self._logprobs(delta.entries)
                    yield self._chunk(delta.index, {"content": delta.text}, logprobs, None)
                if delta.finish_reason:
                    yield self._chunk(delta.index, {}, None, delta.finish_reason)
        if self._include_usage:
            yield orjson.dumps(self._head | {"choices": [], "usage": self._job.usage()})
        yield b"[DONE]"

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: Any, finish_reason: str | None
    ) -> bytes:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        usage = {"usage": None} if self._include_usage else {}
        return orjson.dumps({**self._head, "choices": [choice], **usage})

    def _logprobs(self, entries: list[TokenEntry]) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        content = [
            {
                **self._token(entry.id, entry.logprob),
                "top_logprobs": [self._token(*pair) for pair in entry.alternatives],
            }
            for entry in entries
        ]
        return {"content": content, "refusal": None}

    def _token(self, id: int, logprob: float) -> dict[str, Any]:
        spelled = self._tokenizer.token_bytes(id)
        text = f"token_id:{id}" if self._token_ids_as_text else spelled.decode(errors="replace")
        return {"token": text, "logprob": generate.logprob(logprob), "bytes": list(spelled)}


def _check(asked: ChatCompletionRequest) -> None:
    decode.refuse_unsupported(asked)
    generate.check_stream_options(asked)
    if asked.top_logprobs is not None and not asked.logprobs:
        raise ApiError(
            400,
            "Invalid 'top_logprobs': it is only allowed when 'logprobs' is true.",
            param="top_logprobs",
            code="invalid_value",
        )


def _plain(message: Message, index: int) -> dict[str, str]:
    """A message as templates know it: the content one string, `developer` the older `system`."""
    content = message.content
    if not isinstance(content, str):
        where = f"messages[{index}].content"
        content = "".join(_text(part, f"{where}[{j}]") for j, part in enumerate(content))
    role = "system" if message.role == "developer" else message.role
    plain = {"role": role, "content": content}
    return plain | ({"name": message.name} if message.name else {})


def _text(part: ContentPart, param: str) -> str:
    if part.type != "text":
        raise ApiError(
            400,
            f"Invalid value for '{param}.type': expected 'text', the only type that this model "
            f"takes, but got '{part.type}'.",
            param=f"{param}.type",
            code="unsupported_value",
        )
    if part.text is None:
        raise ApiError(
            400,
            f"Missing required parameter: '{param}.text'.",
            param=f"{param}.text",
            code="missing_required_parameter",
        )
    return part.text
