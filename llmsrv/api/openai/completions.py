"""POST /v1/completions: a prompt as text or token ids in, its continuation out.

Source: OpenAI API reference, "Completions".
"""

import asyncio
from collections.abc import AsyncGenerator
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
from itertools import accumulate
from typing import Any

import orjson

from llmsrv.api.decode import BodyDecoder
from llmsrv.api.generation import submit
from llmsrv.api.generation.job import Job
from llmsrv.api.generation.job import start
from llmsrv.api.generation.output import Delta
from llmsrv.api.generation.output import TokenEntry
from llmsrv.api.openai import logprobs
from llmsrv.api.openai import structured
from llmsrv.api.openai.checks import check_shared_fields
from llmsrv.api.openai.reply import Reply
from llmsrv.api.openai.schema import CompletionRequest
from llmsrv.api.openai.schema import MAX_PROMPTS
from llmsrv.api.openai.schema import UNSUPPORTED
from llmsrv.asgi.request import Request
from llmsrv.asgi.response import Response
from llmsrv.asgi.sse import EventStream
from llmsrv.config import Config
from llmsrv.errors import invalid
from llmsrv.registry.models import Models
from llmsrv.registry.service import Service
from llmsrv.text.detokenizer import Detokenizer
from llmsrv.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16  # OpenAI's


class Completions:
    def __init__(self, models: Models) -> None:
        self._models = models
        self._decoder = BodyDecoder(CompletionRequest, UNSUPPORTED)

    async def __call__(self, request: Request) -> Response | EventStream:
        asked = await self._decoder.read(request, self._models)
        _check(asked, self._models.config)
        service = self._models.find(asked.model, submit.tenant_of(request))
        prompts = await _prompt_ids(service, asked)
        max_tokens = [
            submit.output_limit(service, len(ids), asked.max_tokens, DEFAULT_MAX_TOKENS, "prompt")
            for ids in prompts
        ]
        submits = submit.make_submits(
            service,
            asked,
            prompts,
            max_tokens,
            n=asked.best_of or asked.n or 1,
            num_logprobs=_num_logprobs(asked),
            wants_prompt_logprobs=_wants_prompt_logprobs(asked),
            tenant=submit.tenant_of(request),
            grammar=await structured.grammar_of(service, asked),
        )
        rules = submit.text_rules(asked, service.text.tokenizer)
        job = await start(request, Job(service, submits, rules))
        answer = _Answer(service, asked, job, prompts)
        if asked.stream:
            return EventStream(answer.events(), on_end=job.end)
        async with request.cancel_on_disconnect():
            return Response(body=await answer.whole())


class _Answer:
    """One request's answer in OpenAI's shape."""

    def __init__(
        self, service: Service, asked: CompletionRequest, job: Job, prompts: list[list[int]]
    ) -> None:
        self._tokenizer = service.text.tokenizer
        self._asked = asked
        self._job = job
        self._prompts = prompts
        self._shapes = logprobs.Shapes(
            self._tokenizer, asked.logprobs or 0, bool(asked.return_tokens_as_token_ids)
        )
        self._begun: set[int] = set()  # choices of which something was told
        self._echoes: dict[int, _Echo] = {}  # by prompt
        self._reply = Reply(service, asked, job, "text_completion", "cmpl")

    async def whole(self) -> bytes:
        """The answer as one object, when every choice has ended."""
        deltas = await self._job.whole()
        if self._asked.best_of:
            deltas = _best(deltas, self._asked.best_of, self._asked.n or 1)
        if self._asked.echo or _wants_prompt_logprobs(self._asked):  # work for each prompt token
            return await asyncio.to_thread(self._body, deltas)
        return self._body(deltas)

    def _body(self, deltas: list[Delta]) -> bytes:
        num_each = len(deltas) // len(self._prompts)
        choices = [self._choice(delta, i // num_each) for i, delta in enumerate(deltas)]
        return orjson.dumps(self._reply.whole(choices))

    def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as the payloads of server-sent events."""
        return self._reply.events(self._chunks)

    def _chunks(self, delta: Delta) -> list[bytes]:
        return [self._reply.chunk(self._choice(delta, delta.index // (self._asked.n or 1)))]

    def _choice(self, delta: Delta, prompt: int) -> dict[str, Any]:
        """A choice in full, or what is new of it; with its first piece comes what echoes the
        prompt."""
        is_first = delta.index not in self._begun
        self._begun.add(delta.index)
        echo = self._echo(prompt)
        choice: dict[str, Any] = {
            "index": delta.index,
            "text": echo.text + delta.text if is_first else delta.text,
            "logprobs": self._logprobs(delta, echo, is_first),
            "finish_reason": delta.finish_reason,
        }
        if (num_asked := self._asked.prompt_logprobs) is not None:
            entries = self._job.prompt_entries[prompt]
            choice["prompt_logprobs"] = logprobs.of_prompt(self._tokenizer, entries, num_asked)
        if self._asked.return_token_ids:
            choice["token_ids"] = delta.ids
            if is_first:
                choice["prompt_token_ids"] = self._prompts[prompt]
        return choice

    def _logprobs(self, delta: Delta, echo: "_Echo", is_first: bool) -> dict[str, Any] | None:
        if self._asked.logprobs is None:
            return None
        entries = [replace(entry, start=entry.start + len(echo.text)) for entry in delta.entries]
        if not is_first:
            return self._shapes.completion(entries, None)
        return self._shapes.completion([*echo.entries, *entries], echo.first_id)

    def _echo(self, prompt: int) -> "_Echo":
        if not self._asked.echo:
            return _Echo()
        if prompt not in self._echoes:
            text, _ = _prompts(self._asked.prompt)[prompt]
            ids, entries = self._prompts[prompt], self._job.prompt_entries[prompt]
            self._echoes[prompt] = _echo_of(self._tokenizer, text, ids, entries)
        return self._echoes[prompt]


# ---- The prompt


def _prompts(prompt: str | list[Any]) -> list[tuple[str | list[int], str]]:
    """The prompts of a request, each with the name that an error gives it.

    A prompt is a string or a list of ids; a request has one, or a list of them.
    """
    if isinstance(prompt, str):
        return [(prompt, "prompt")]
    types = set(map(type, prompt))
    if types == {int}:
        return [(prompt, "prompt")]
    if int not in types and len(prompt) <= MAX_PROMPTS:
        return [(item, f"prompt[{i}]") for i, item in enumerate(prompt)]
    raise invalid(
        "prompt",
        "expected a string, a list of token ids, or a list of at most "
        f"{MAX_PROMPTS} of either, but got a list of {len(prompt)} items",
    )


async def _prompt_ids(service: Service, asked: CompletionRequest) -> list[list[int]]:
    """The ids of each prompt; ApiError 400 naming the one that cannot be."""
    prompts = _prompts(asked.prompt)
    texts = [(prompt, param) for prompt, param in prompts if isinstance(prompt, str)]
    texts += [(asked.suffix, "suffix")] if asked.suffix else []

    def all_ids() -> list[list[int]]:
        return [_ids(service, asked, prompt, param) for prompt, param in prompts]

    if sum(len(text) for text, _ in texts) <= submit.INLINE_CHARS:
        return all_ids()
    if asked.truncate_prompt_tokens is None:
        for text, param in texts:
            submit.refuse_too_long(service, service.text.tokenizer, text, param)
    return await asyncio.to_thread(all_ids)


def _ids(
    service: Service, asked: CompletionRequest, prompt: str | list[int], param: str
) -> list[int]:
    tokenizer = service.text.tokenizer
    ids = _encode(tokenizer, prompt, param)
    if asked.suffix:
        if tokenizer.fill_in_ids is None:
            raise invalid("suffix", "this model's vocabulary has no tokens for filling in")
        before, between, behind = tokenizer.fill_in_ids
        ids = [before, *ids, between, *_encode(tokenizer, asked.suffix, "suffix"), behind]
    if asked.add_special_tokens is not False and isinstance(prompt, str):
        ids = tokenizer.with_bos(ids)
    if not ids:
        raise invalid(param, "expected at least one token, but got an empty prompt")
    return submit.truncated(service, asked, ids)


def _encode(tokenizer: Tokenizer, prompt: str | list[int], param: str) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer.encode(prompt, parse_special=True)
    if prompt and max(prompt) >= tokenizer.vocab_size:
        below = f"token ids must be below {tokenizer.vocab_size}"
        raise invalid(param, f"{below}, but got {max(prompt)}")
    return prompt


# ---- The prompt's echo


@dataclass(frozen=True)
class _Echo:
    """text      what comes before the completion
    first_id  the prompt's first token, which has no log-probability
    entries   of the others
    """

    text: str = ""
    first_id: int | None = None
    entries: Sequence[TokenEntry] = ()


def _echo_of(
    tokenizer: Tokenizer, prompt: str | list[int], ids: list[int], entries: Sequence[TokenEntry]
) -> _Echo:
    """The prompt as the client sent it, with the place of each token in it.

    What the ids print may begin with a BOS or a blank that the client did not send."""
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
    pieces = [detokenizer.push([id]) for id in ids] + [detokenizer.flush()]
    starts = [0, *accumulate(map(len, pieces))]
    text = "".join(pieces)
    num_added = 0
    if isinstance(prompt, str) and text.endswith(prompt):
        num_added = len(text) - len(prompt)
    placed = [
        replace(entry, start=max(0, start - num_added))
        for entry, start in zip(entries, starts[1:])
    ]
    return _Echo(text[num_added:], ids[0], placed)


# ---- What is asked for


def _check(asked: CompletionRequest, config: Config) -> None:
    check_shared_fields(asked, config)
    if asked.best_of is not None and asked.best_of < (asked.n or 1):
        raise invalid("best_of", f"expected at least 'n', {asked.n}, but got {asked.best_of}")
    if asked.stream and (asked.best_of or 1) > (asked.n or 1):
        raise invalid("best_of", "more than 'n' is not allowed when 'stream' is true")


def _wants_prompt_logprobs(asked: CompletionRequest) -> bool:
    """Whether the log-probabilities of the prompt are wanted."""
    return asked.prompt_logprobs is not None or bool(asked.echo and asked.logprobs is not None)


def _num_logprobs(asked: CompletionRequest) -> int:
    """How many alternatives the engine is asked for; choices are ranked by log-probability."""
    counts = [asked.logprobs, asked.prompt_logprobs, 0 if asked.best_of else None]
    return max((count for count in counts if count is not None), default=-1)


def _best(deltas: list[Delta], best_of: int, n: int) -> list[Delta]:
    """Of each prompt's best_of choices the n that are most likely a token, the first of them
    first."""
    chosen: list[Delta] = []
    for first in range(0, len(deltas), best_of):
        ranked = sorted(deltas[first : first + best_of], key=_mean_logprob, reverse=True)
        chosen += ranked[:n]
    return [replace(delta, index=index) for index, delta in enumerate(chosen)]


def _mean_logprob(delta: Delta) -> float:
    values = [logprobs.finite(entry.logprob) for entry in delta.entries]
    return sum(values) / len(values) if values else 0.0
