"""One request's generation, whatever its route: checked against the model, submitted, and followed
until every choice has ended.

Knows token ids and deltas of text; the shapes of chat and completions are in their own modules.
"""

import asyncio
import math
import secrets
import time
from collections.abc import AsyncGenerator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

from llmsrv.api.output import ChoiceOutput
from llmsrv.api.output import Delta
from llmsrv.api.schema import GenerationRequest
from llmsrv.api.service import Service
from llmsrv.asgi.request import Request
from llmsrv.engine.client import Generation
from llmsrv.engine.messages import Finished
from llmsrv.engine.messages import Sampling
from llmsrv.engine.messages import Submit
from llmsrv.errors import ApiError
from llmsrv.text.tokenizer import Tokenizer

ADMISSION_S = 10.0  # after this a stream's 200 goes out although its request still waits
INLINE_CHARS = 4096  # longer texts are tokenised in a thread: about 1 ms of the loop's time


class Job:
    """The choices of one request: choice i * n + j is the j-th choice of prompt i."""

    def __init__(
        self,
        service: Service,
        tokenizer: Tokenizer,
        request: GenerationRequest,
        prompts: list[list[int]],
        max_tokens: list[int],
        num_logprobs: int,
        tenant: bytes,
    ) -> None:
        """tenant: requests of different tenants share no prefix, so none can time another's."""
        self.num_prompt_tokens = sum(map(len, prompts))
        self._service = service
        self._n = request.n or 1
        self._has_ended = False
        end_ids = [] if request.ignore_eos else sorted(tokenizer.end_ids)
        end_ids += request.stop_token_ids or []
        min_tokens = request.min_tokens or 0
        stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
        self.outputs = [
            ChoiceOutput(index, tokenizer, stops, end_ids, min_tokens)
            for index in range(len(prompts) * self._n)
        ]
        self._generations: list[Generation] = []
        sampling = sampling_of(request, service.text.sampling_defaults, num_logprobs)
        timeout_s = service.config.request_timeout_s
        deadline_s = time.monotonic() + timeout_s if timeout_s else math.inf
        try:
            for ids, limit in zip(prompts, max_tokens, strict=True):
                submit = Submit(
                    request=0,
                    prompt_ids=ids,
                    max_tokens=limit,
                    end_ids=end_ids,
                    sampling=sampling,
                    n=self._n,
                    salt=tenant,
                    min_tokens=min(min_tokens, limit),
                    tenant=tenant,
                    deadline_s=deadline_s,
                )
                self._generations.append(service.engine.submit(submit))
        except ApiError:
            self.end()
            raise

    async def admitted(self) -> None:
        """Returns when every prompt is, or after ADMISSION_S; raises what came instead."""
        try:
            async with asyncio.timeout(ADMISSION_S):
                for generation in self._generations:
                    await generation.admitted()
        except TimeoutError:
            pass  # the answer begins now, and pings keep it alive until there is a token

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Every choice's deltas as they come; ends the job when it is exhausted or closed."""
        streams = [self._follow(i, generation) for i, generation in enumerate(self._generations)]
        try:
            async with aclosing(streams[0] if len(streams) == 1 else _merge(streams)) as merged:
                async for delta in merged:
                    yield delta
        finally:
            self.end()

    async def whole(self) -> list[Delta]:
        """Each choice as one delta, when all have ended."""
        whole = [Delta(output.index, "") for output in self.outputs]
        async with aclosing(self.deltas()) as deltas:
            async for delta in deltas:
                whole[delta.index].text += delta.text
                whole[delta.index].entries += delta.entries
                whole[delta.index].finish_reason = delta.finish_reason
        return whole

    def end(self) -> None:
        """Aborts what still runs and counts the request, once."""
        if self._has_ended:
            return
        self._has_ended = True
        for generation in self._generations:
            generation.abort()
        self._count()

    def usage(self) -> dict[str, Any]:
        num_output_tokens = sum(output.num_tokens for output in self.outputs)
        num_cached_tokens = sum(generation.num_cached_tokens for generation in self._generations)
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": num_output_tokens,
            "total_tokens": self.num_prompt_tokens + num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": num_cached_tokens},
        }

    async def _follow(self, prompt: int, generation: Generation) -> AsyncGenerator[Delta, None]:
        outputs = self.outputs[prompt * self._n : (prompt + 1) * self._n]
        async for event in generation:
            output = outputs[event.choice]
            if output.finish_reason:
                continue  # what the engine sent before it learnt of the stop string
            if isinstance(event, Finished):
                delta: Delta | None = output.finish(event.reason)
            else:
                delta = output.push(event)
                if output.finish_reason:
                    generation.abort(event.choice)
            if delta:
                yield delta
            if all(output.finish_reason for output in outputs):
                return

    def _count(self) -> None:
        counters = self._service.counters
        counters.prompt_tokens += self.num_prompt_tokens
        for output in self.outputs:
            counters.generation_tokens += output.num_tokens
            counters.finished[output.finish_reason or "abort"] += 1


def tenant_of(request: Request) -> bytes:
    tenant: bytes = request.state.get("tenant", b"")
    return tenant


async def start(request: Request, job: Job) -> Job:
    """Waits until the job is admitted; a client that leaves meanwhile ends it."""
    try:
        async with request.cancel_on_disconnect():
            await job.admitted()
    except BaseException:
        job.end()
        raise
    return job


def check_stream_options(request: GenerationRequest) -> None:
    if request.stream_options is not None and not request.stream:
        raise ApiError(
            400,
            "Invalid 'stream_options': it is only allowed when 'stream' is true.",
            param="stream_options",
            code="invalid_value",
        )


def sampling_of(
    request: GenerationRequest, defaults: Mapping[str, float], num_logprobs: int
) -> Sampling:
    """The request's parameters as the engine takes them, with the model's defaults for those that
    it leaves out; without a seed, with a random one."""

    def value(name: str, neutral: float) -> float:
        asked: float | None = getattr(request, name)
        return defaults.get(name, neutral) if asked is None else asked

    return Sampling(
        seed=secrets.randbits(64) if request.seed is None else request.seed % 2**64,
        temperature=value("temperature", 1.0),
        top_k=max(int(value("top_k", 0)), 0),
        top_p=value("top_p", 1.0),
        min_p=value("min_p", 0.0),
        typical_p=value("typical_p", 1.0),
        repetition_penalty=value("repetition_penalty", 1.0),
        presence_penalty=value("presence_penalty", 0.0),
        frequency_penalty=value("frequency_penalty", 0.0),
        logit_bias=request.logit_bias or {},
        allowed_ids=request.allowed_token_ids or [],
        num_logprobs=num_logprobs,
    )


def output_limit(
    service: Service, num_prompt_tokens: int, asked: int | None, default: int | None, param: str
) -> int:
    """How many tokens may be put out after a prompt; `default` None means all that the context has.

    ApiError 400 context_length_exceeded when prompt and what was asked for do not fit.
    """
    assert service.engine.ready is not None
    context = service.engine.ready.context_length
    left = context - num_prompt_tokens
    if left < (asked or 1):
        raise ApiError(
            400,
            f"This model's maximum context length is {context} tokens. However, you requested "
            f"{num_prompt_tokens + (asked or 1)} tokens ({num_prompt_tokens} in the {param}, "
            f"{asked or 1} in the completion). Please reduce the length of the {param}"
            + (" or the completion." if asked else "."),
            param=param,
            code="context_length_exceeded",
        )
    return asked or min(left, default or left)


def refuse_too_long(service: Service, tokenizer: Tokenizer, text: str, param: str) -> None:
    """Refuses before any work a text whose length alone shows that it cannot fit the context."""
    assert service.engine.ready is not None
    at_least = len(text) // tokenizer.longest_token
    if at_least >= service.engine.ready.context_length:
        output_limit(service, at_least, None, None, param)


def head(service: Service, model: str, kind: str, prefix: str) -> dict[str, Any]:
    """The fields with which every response object of a request begins."""
    return {
        "id": f"{prefix}-{secrets.token_hex(16)}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": service.fingerprint,
    }


def wants_usage(request: GenerationRequest) -> bool:
    """Whether a stream ends with a chunk of usage; all others then say `"usage": null`."""
    return bool(request.stream_options and request.stream_options.include_usage)


def logprob(value: float) -> float:
    """JSON has no infinity; -9999 is what OpenAI sends for a token that cannot be."""
    return value if value > -9999.0 else -9999.0


async def _merge(streams: Sequence[AsyncGenerator[Delta, None]]) -> AsyncGenerator[Delta, None]:
    """The deltas of several streams in the order they come; the first error ends them all."""
    deltas: asyncio.Queue[Delta | None] = asyncio.Queue()

    async def forward(stream: AsyncGenerator[Delta, None]) -> None:
        try:
            async for delta in stream:
                deltas.put_nowait(delta)
        finally:
            deltas.put_nowait(None)

    tasks = [asyncio.create_task(forward(stream)) for stream in streams]
    try:
        for _ in tasks:
            while (delta := await deltas.get()) is not None:
                yield delta
            for task in tasks:
                if task.done():
                    task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
