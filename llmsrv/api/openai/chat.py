"""POST /v1/chat/completions: messages in, an assistant's message out, whole or as a stream.

Source: OpenAI API reference, "Chat Completions".
"""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import orjson

from llmsrv.api.decode import BodyDecoder
from llmsrv.api.generation import submit
from llmsrv.api.generation.job import Job
from llmsrv.api.generation.job import start
from llmsrv.api.generation.message import MessageReader
from llmsrv.api.generation.message import begins_thinking
from llmsrv.api.generation.message import shown_tokens
from llmsrv.api.generation.output import Delta
from llmsrv.api.generation.prompt import prompt_ids
from llmsrv.api.generation.tools import ToolUse
from llmsrv.api.generation.tools import grammar_of
from llmsrv.api.generation.tools import tool_use
from llmsrv.api.openai import logprobs
from llmsrv.api.openai.checks import check_shared_fields
from llmsrv.api.openai.reply import Reply
from llmsrv.api.openai.schema import ChatCompletionRequest
from llmsrv.api.openai.schema import UNSUPPORTED
from llmsrv.asgi.request import Request
from llmsrv.asgi.response import Response
from llmsrv.asgi.sse import EventStream
from llmsrv.config import Config
from llmsrv.errors import invalid
from llmsrv.registry.models import Models
from llmsrv.registry.service import Service


class ChatCompletions:
    def __init__(self, models: Models) -> None:
        self._models = models
        self._decoder = BodyDecoder(ChatCompletionRequest, UNSUPPORTED)

    async def __call__(self, request: Request) -> Response | EventStream:
        asked = await self._decoder.read(request, self._models)
        _check(asked, self._models.config)
        service = self._models.find(asked.model, submit.tenant_of(request))
        tools = tool_use(service, asked)
        ids = await prompt_ids(service, asked, tools.tools if tools else [])
        is_thinking = _is_thinking(service, ids)
        submits = submit.make_submits(
            service,
            asked,
            [ids],
            [submit.output_limit(service, len(ids), asked.max_tokens, None, "messages")],
            n=asked.n or 1,
            num_logprobs=_num_logprobs(asked),
            wants_prompt_logprobs=asked.prompt_logprobs is not None,
            tenant=submit.tenant_of(request),
            grammar=await grammar_of(service, asked, tools, is_thinking),
        )
        shown = shown_tokens(service.text.tokenizer, tools, is_thinking)
        rules = submit.text_rules(asked, service.text.tokenizer, shown, is_thinking)
        job = await start(request, Job(service, submits, rules))
        answer = _Answer(service, asked, job, ids, tools, is_thinking)
        if asked.stream:
            return EventStream(answer.events(), on_end=job.end)
        async with request.cancel_on_disconnect():
            return Response(body=await answer.whole())


class _Answer:
    """One request's answer in OpenAI's shape."""

    def __init__(
        self,
        service: Service,
        asked: ChatCompletionRequest,
        job: Job,
        prompt_ids: list[int],
        tools: ToolUse | None,
        is_thinking: bool | None,
    ) -> None:
        self._tokenizer = service.text.tokenizer
        self._asked = asked
        self._job = job
        self._prompt_ids = prompt_ids
        self._shapes = logprobs.Shapes(
            self._tokenizer, asked.top_logprobs or 0, bool(asked.return_tokens_as_token_ids)
        )
        self._readers = [MessageReader(tools, is_thinking) for _ in job.outputs]
        kind = "chat.completion.chunk" if asked.stream else "chat.completion"
        self._reply = Reply(service, asked, job, kind, "chatcmpl")

    async def whole(self) -> bytes:
        """The answer as one object, when every choice has ended."""
        body = self._reply.whole([self._choice(delta) for delta in await self._job.whole()])
        if (num_asked := self._asked.prompt_logprobs) is not None:
            entries = self._job.prompt_entries[0]
            body["prompt_logprobs"] = await asyncio.to_thread(
                logprobs.of_prompt, self._tokenizer, entries, num_asked
            )
        if self._asked.return_token_ids:
            body["prompt_token_ids"] = self._prompt_ids
        return orjson.dumps(body)

    def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as the payloads of server-sent events."""
        first = {"role": "assistant", "content": ""}
        opening = [self._chunk(Delta(output.index, ""), first) for output in self._job.outputs]
        return self._reply.events(self._chunks, opening)

    def _choice(self, delta: Delta) -> dict[str, Any]:
        reader = self._readers[delta.index]
        assert delta.finish_reason is not None
        choice = {
            "index": delta.index,
            "message": reader.message(delta.text),
            "logprobs": self._logprobs(delta),
            "finish_reason": reader.finish_reason(delta.finish_reason),
        }
        return choice | ({"token_ids": delta.ids} if self._asked.return_token_ids else {})

    def _chunks(self, delta: Delta) -> list[bytes]:
        """Of one delta: its parts, the first with all log-probabilities; the reason by itself."""
        reader, reason = self._readers[delta.index], delta.finish_reason
        parts = reader.deltas(delta.text, is_last=reason is not None)
        if not parts and (delta.entries or (delta.ids and self._asked.return_token_ids)):
            parts = [{}]
        chunks = [self._chunk(delta, part) for part in parts[:1]]
        chunks += [self._chunk(Delta(delta.index, ""), part) for part in parts[1:]]
        if reason is not None:
            told = reader.finish_reason(reason)
            chunks.append(self._chunk(Delta(delta.index, ""), {}, told))
        return chunks

    def _chunk(self, delta: Delta, part: dict[str, Any], reason: str | None = None) -> bytes:
        choice = {
            "index": delta.index,
            "delta": part,
            "logprobs": self._logprobs(delta) if delta.entries else None,
            "finish_reason": reason,
        }
        if not self._asked.return_token_ids:
            return self._reply.chunk(choice)
        choice["token_ids"] = delta.ids
        prompt = {"prompt_token_ids": self._prompt_ids} if "role" in part else {}
        return self._reply.chunk(choice, **prompt)

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        return self._shapes.chat(delta.entries) if self._asked.logprobs else None


def _check(asked: ChatCompletionRequest, config: Config) -> None:
    check_shared_fields(asked, config)
    if asked.top_logprobs is not None and not asked.logprobs:
        raise invalid("top_logprobs", "it is only allowed when 'logprobs' is true")
    asked.max_tokens = asked.max_completion_tokens or asked.max_tokens


def _num_logprobs(asked: ChatCompletionRequest) -> int:
    """How many alternatives the engine is asked for."""
    of_answer = (asked.top_logprobs or 0) if asked.logprobs else -1
    return max(of_answer, -1 if asked.prompt_logprobs is None else asked.prompt_logprobs)


def _is_thinking(service: Service, prompt_ids: list[int]) -> bool | None:
    """Whether the prompt has begun the thoughts before the answer; None: the model has none."""
    asked, template = service.config.reasoning_parser, service.text.template
    if asked == "think" or (asked == "auto" and template and template.has_thoughts):
        return begins_thinking(service.text.tokenizer, prompt_ids)
    return None
