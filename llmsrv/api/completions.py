"""POST /v1/completions: a prompt as text or token ids in, its continuation out.

Source: OpenAI API reference, "Completions".
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
from llmsrv.api.output import Delta
from llmsrv.api.output import TokenEntry
from llmsrv.api.schema import MAX_PROMPTS
from llmsrv.api.schema import CompletionRequest
from llmsrv.api.service import Service
from llmsrv.asgi.request import Request
from llmsrv.asgi.response import Response
from llmsrv.asgi.sse import EventStream
from llmsrv.errors import ApiError
from llmsrv.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16  # OpenAI's


class Completions:
    def __init__(self, models: Models) -> None:
        self._models = models
        self._decoder = msgspec.json.Decoder(CompletionRequest)

    async def __call__(self, request: Request) -> Response | EventStream:
        asked = await decode.read(request, self._decoder, self._models.body_limit_bytes)
        decode.refuse_unsupported(asked)
        generate.check_stream_options(asked)
        service = self._models.find(asked.model)
        tokenizer = service.text.tokenizer
        prompts = [
            await self._encode(service, prompt, param) for prompt, param in _prompts(asked.prompt)
        ]
        max_tokens = [
            generate.output_limit(
                service, len(ids), asked.max_tokens, DEFAULT_MAX_TOKENS, "prompt"
            )
            for ids in prompts
        ]
        num_logprobs = -1 if asked.logprobs is None else asked.logprobs
        tenant = generate.tenant_of(request)
        job = Job(service, tokenizer, asked, prompts, max_tokens, num_logprobs, tenant)
        await generate.start(request, job)
        answer = _Answer(service, tokenizer, asked, job)
        if asked.stream:
            return EventStream(answer.events(), on_end=job.end)
        async with request.cancel_on_disconnect():
            return Response(body=await answer.whole())

    async def _encode(
        self, service: Service, prompt: str | list[int], param: str
    ) -> list[int]:
        tokenizer = service.text.tokenizer
        if not isinstance(prompt, str):
            return _checked_ids(prompt, tokenizer.vocab_size, param)
        if len(prompt) <= generate.INLINE_CHARS:
            ids = tokenizer.encode(prompt, parse_special=True)
        else:
            generate.refuse_too_long(service, tokenizer, prompt, "prompt")
            ids = await asyncio.to_thread(tokenizer.encode, prompt, parse_special=True)
        ids = tokenizer.with_bos(ids)
        if not ids:
            raise _empty(param)
        return ids


class _Answer:
    """One request's answer in OpenAI's shape."""

    def __init__(
        self, service: Service, tokenizer: Tokenizer, asked: CompletionRequest, job: Job
    ) -> None:
        self._tokenizer = tokenizer
        self._job = job
        self._with_logprobs = asked.logprobs is not None
        self._token_ids_as_text = bool(asked.return_tokens_as_token_ids)
        self._include_usage = generate.wants_usage(asked)
        self._head = generate.head(service, asked.model, "text_completion", "cmpl")

    async def whole(self) -> bytes:
        """The answer as one object, when every choice has ended."""
        choices = [self._choice(choice) for choice in await self._job.whole()]
        return orjson.dumps(self._head | {"choices": choices, "usage": self._job.usage()})

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as the payloads of server-sent events."""
        usage = {"usage": None} if self._include_usage else {}
        async with aclosing(self._job.deltas()) as deltas:
            async for delta in deltas:
                yield orjson.dumps({**self._head, "choices": [self._choice(delta)], **usage})
        if self._include_usage:
            yield orjson.dumps(self._head | {"choices": [], "usage": self._job.usage()})
        yield b"[DONE]"

    def _choice(self, delta: Delta) -> dict[str, Any]:
        return {
            "index": delta.index,
            "text": delta.text,
            "logprobs": self._logprobs(delta.entries),
            "finish_reason": delta.finish_reason,
        }

    def _logprobs(self, entries: list[TokenEntry]) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        return {
            "tokens": [self._text(entry.id) for entry in entries],
            "token_logprobs": [generate.logprob(entry.logprob) for entry in entries],
            "top_logprobs": [
                {self._text(id): generate.logprob(value) for id, value in entry.alternatives}
                for entry in entries
            ],
            "text_offset": [entry.start for entry in entries],
        }

    def _text(self, id: int) -> str:
        if self._token_ids_as_text:
            return f"token_id:{id}"
        return self._tokenizer.token_bytes(id).decode(errors="replace")


def _prompts(prompt: str | list[Any]) -> list[tuple[str | list[int], str]]:
    """The prompts of a request, each with the name that an error gives it.

    A prompt is a string or a list of ids; a request has one, or a list of them.
    """
    if isinstance(prompt, str) or all(isinstance(id, int) for id in prompt):
        return [(prompt, "prompt")]
    if not any(isinstance(item, int) for item in prompt) and len(prompt) <= MAX_PROMPTS:
        return [(item, f"prompt[{i}]") for i, item in enumerate(prompt)]
    raise ApiError(
        400,
        "Invalid 'prompt': expected a string, a list of token ids, or a list of at most "
        f"{MAX_PROMPTS} of either, but got a list of {len(prompt)} items.",
        param="prompt",
        code="invalid_value",
    )


def _checked_ids(ids: list[int], vocab_size: int, param: str) -> list[int]:
    if not ids:
        raise _empty(param)
    if max(ids) >= vocab_size:
        raise ApiError(
            400,
            f"Invalid '{param}': token ids must be below {vocab_size}, but got {max(ids)}.",
            param=param,
            code="invalid_value",
        )
    return ids


def _empty(param: str) -> ApiError:
    message = f"Invalid '{param}': expected at least one token, but got an empty prompt."
    return ApiError(400, message, param=param, code="invalid_value")
