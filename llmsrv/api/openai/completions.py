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
from llmsrv.api.generation.grammar import answer_grammar
from llmsrv.api.generation.job import Job
from llmsrv.api.generation.job import start_job
from llmsrv.api.generation.output import Delta
from llmsrv.api.generation.output import TokenLogprob
from llmsrv.api.generation.respond import respond
from llmsrv.api.openai.checks import check_shared_fields
from llmsrv.api.openai.logprobs import LogprobFormatter
from llmsrv.api.openai.logprobs import are_large
from llmsrv.api.openai.logprobs import finite
from llmsrv.api.openai.logprobs import prompt_logprobs
from llmsrv.api.openai.reply import Reply
from llmsrv.api.openai.schema import CompletionRequest
from llmsrv.api.openai.schema import IGNORED
from llmsrv.api.openai.schema import MAX_PROMPTS
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
from llmsrv.text.detokenizer import Detokenizer
from llmsrv.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16  # OpenAI's


class Completions:
    def __init__(self, models: Models) -> None:
        self._models = models
        body_type = with_default_model(CompletionRequest, models.default_name)
        self._decoder = BodyDecoder(body_type, UNSUPPORTED, IGNORED)

    async def __call__(self, request: Request) -> Response | EventStream:
        tenant = submit.tenant_of(request)
        body = await self._decoder.read_for_model(request, self._models, tenant)
        _check(body, self._models.config)
        service = self._models.find(body.model, tenant)
        body.prompt_logprobs = submit.num_alternatives(service, body.prompt_logprobs)
        prompts = await _prompt_ids(service, body)
        job = start_job(
            request,
            service,
            body,
            prompts,
            [_max_tokens(service, body, len(ids)) for ids in prompts],
            n=body.best_of or body.n or 1,
            num_logprobs=_num_logprobs(body),
            wants_prompt_logprobs=_echoes_logprobs(body),
            grammar=await answer_grammar(service, wanted_grammar(body, service.text.tokenizer)),
        )
        answer = CompletionAnswer(service, body, job, prompts)
        return await respond(request, job, answer, is_stream=bool(body.stream))


def _check(body: CompletionRequest, config: Config) -> None:
    check_shared_fields(body, config)
    if body.best_of is not None and body.best_of < (body.n or 1):
        raise invalid("best_of", f"expected at least 'n', {body.n}, but got {body.best_of}")
    if body.stream and (body.best_of or 1) > (body.n or 1):
        raise invalid("best_of", "more than 'n' is not allowed when 'stream' is true")


def _max_tokens(service: Service, body: CompletionRequest, num_prompt_tokens: int) -> int:
    default = DEFAULT_MAX_TOKENS
    return submit.max_output_tokens(
        service, num_prompt_tokens, body.max_tokens, default, "prompt"
    )


def _num_logprobs(body: CompletionRequest) -> int:
    """Alternatives per token; choices are ranked by log-probability."""
    return max(-1 if body.logprobs is None else body.logprobs, 0 if body.best_of else -1)


def _echoes_logprobs(body: CompletionRequest) -> bool:
    return bool(body.echo and body.logprobs is not None)


class CompletionAnswer:
    """One request's answer in OpenAI's shape."""

    def __init__(
        self, service: Service, body: CompletionRequest, job: Job, prompts: list[list[int]]
    ) -> None:
        # Not the body, and the prompts only if they are wanted: thousands of streams may wait.
        self._tokenizer = service.text.tokenizer
        self._job = job
        self._num_prompts = len(prompts)
        self._prompts = prompts if body.return_token_ids or body.echo else []
        self._echoed = _named_prompts(body.prompt) if body.echo else None
        self._n = body.n or 1
        self._best_of = body.best_of
        self._num_logprobs = body.logprobs
        self._num_prompt_logprobs = body.prompt_logprobs
        self._returns_token_ids = bool(body.return_token_ids)
        self._logprobs = LogprobFormatter(
            self._tokenizer, body.logprobs or 0, bool(body.return_tokens_as_token_ids)
        )
        self._begun: set[int] = set()  # choices of which a piece was sent
        self._echoed_prompts: dict[int, EchoedPrompt] = {}  # by index of the prompt
        self._reply = Reply(service, body, job, "text_completion", "cmpl")

    async def whole(self) -> bytes:
        choices = await self._job.collect()
        if self._best_of:
            choices = _best(choices, self._best_of, self._n)
        has_prompt = self._echoed is not None or self._num_prompt_logprobs is not None
        if has_prompt or are_large(choices, self._num_logprobs):
            return await asyncio.to_thread(self._whole_body, choices)
        return self._whole_body(choices)

    def events(self) -> AsyncGenerator[bytes, None]:
        return self._reply.events(self._chunks, is_slow=self._echoes)

    def _echoes(self, delta: Delta) -> bool:
        """Whether the prompt goes out before this delta: that takes time for each of its tokens."""
        return self._echoed is not None and delta.index not in self._begun

    def _whole_body(self, choices: list[Delta]) -> bytes:
        num_each = len(choices) // self._num_prompts
        shaped = [self._choice(choice, i // num_each) for i, choice in enumerate(choices)]
        return orjson.dumps(self._reply.whole(shaped))

    def _chunks(self, delta: Delta) -> list[bytes]:
        return [self._reply.chunk(self._choice(delta, delta.index // self._n))]

    def _choice(self, delta: Delta, prompt: int) -> dict[str, Any]:
        """A whole choice or a piece of one.  The first piece also echoes the prompt."""
        is_first = delta.index not in self._begun
        self._begun.add(delta.index)
        echo = self._echo(prompt)
        choice: dict[str, Any] = {
            "index": delta.index,
            "text": echo.text + delta.text if is_first else delta.text,
            "logprobs": self._choice_logprobs(delta, echo, is_first),
            "finish_reason": delta.finish_reason,
        }
        if (num_alternatives := self._num_prompt_logprobs) is not None:
            choice["prompt_logprobs"] = prompt_logprobs(
                self._tokenizer, self._job.prompt_logprobs[prompt], num_alternatives
            )
        if self._returns_token_ids:
            choice["token_ids"] = delta.token_ids
            if is_first:
                choice["prompt_token_ids"] = self._prompts[prompt]
        return choice

    def _choice_logprobs(
        self, delta: Delta, echo: "EchoedPrompt", is_first: bool
    ) -> dict[str, Any] | None:
        if self._num_logprobs is None:
            return None
        tokens = [
            replace(token, text_offset=token.text_offset + len(echo.text))
            for token in delta.logprobs
        ]
        if not is_first:
            return self._logprobs.completion(tokens, None)
        return self._logprobs.completion([*echo.logprobs, *tokens], echo.first_id)

    def _echo(self, prompt: int) -> "EchoedPrompt":
        if self._echoed is None:
            return EchoedPrompt()
        if prompt not in self._echoed_prompts:
            text, _ = self._echoed[prompt]
            ids, tokens = self._prompts[prompt], self._job.prompt_logprobs[prompt]
            self._echoed_prompts[prompt] = _echoed_prompt(self._tokenizer, text, ids, tokens)
        return self._echoed_prompts[prompt]


def _best(choices: list[Delta], best_of: int, n: int) -> list[Delta]:
    """The n of each prompt's best_of choices with the highest mean log-probability per token, in
    that order."""
    best: list[Delta] = []
    for first in range(0, len(choices), best_of):
        ranked = sorted(choices[first : first + best_of], key=_mean_logprob, reverse=True)
        best += ranked[:n]
    return [replace(choice, index=index) for index, choice in enumerate(best)]


def _mean_logprob(choice: Delta) -> float:
    values = [finite(token.logprob) for token in choice.logprobs]
    return sum(values) / len(values) if values else 0.0


# ---- The prompt


def _named_prompts(prompt: str | list[Any]) -> list[tuple[str | list[int], str]]:
    """The prompts of a request, each with its name for errors.

    A prompt is a string or a list of ids.  A request has one prompt, or a list of them.
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


async def _prompt_ids(service: Service, body: CompletionRequest) -> list[list[int]]:
    """The token ids of each prompt; ApiError 400 naming the prompt that is invalid."""
    prompts = _named_prompts(body.prompt)
    texts = [(prompt, param) for prompt, param in prompts if isinstance(prompt, str)]
    texts += [(body.suffix, "suffix")] if body.suffix else []

    def all_ids() -> list[list[int]]:
        return [_ids(service, body, prompt, param) for prompt, param in prompts]

    if sum(len(text) for text, _ in texts) <= submit.INLINE_CHARS:
        return all_ids()
    if body.truncate_prompt_tokens is None:
        for text, param in texts:
            submit.check_fits_context(service, len(text), param)
    elif body.suffix:
        submit.check_fits_context(service, len(body.suffix), "suffix")
    return await submit.tokenise_in_thread(all_ids)


def _ids(
    service: Service, body: CompletionRequest, prompt: str | list[int], param: str
) -> list[int]:
    tokenizer = service.text.tokenizer
    if body.truncate_prompt_tokens is not None and isinstance(prompt, str):
        ids = submit.encode_kept(service, body, prompt)
    else:
        ids = _encode(tokenizer, prompt, param)
    if body.suffix:
        if tokenizer.fim_token_ids is None:
            raise invalid("suffix", "this model's vocabulary has no tokens for filling in")
        before, between, behind = tokenizer.fim_token_ids
        ids = [before, *ids, between, *_encode(tokenizer, body.suffix, "suffix"), behind]
    if body.add_special_tokens is not False and isinstance(prompt, str):
        ids = tokenizer.with_bos(ids)
    if not ids:
        raise invalid(param, "expected at least one token, but got an empty prompt")
    return submit.truncate_prompt(service, body, ids)


def _encode(tokenizer: Tokenizer, prompt: str | list[int], param: str) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer.encode(prompt, parse_special=True)
    if prompt and max(prompt) >= tokenizer.vocab_size:
        below = f"token ids must be below {tokenizer.vocab_size}"
        raise invalid(param, f"{below}, but got {max(prompt)}")
    return prompt


# ---- The echoed prompt


@dataclass(frozen=True)
class EchoedPrompt:
    """text      what precedes the completion
    first_id  the prompt's first token, which has no log-probability
    logprobs  of the other tokens
    """

    text: str = ""
    first_id: int | None = None
    logprobs: Sequence[TokenLogprob] = ()


def _echoed_prompt(
    tokenizer: Tokenizer,
    prompt: str | list[int],
    ids: list[int],
    logprobs: Sequence[TokenLogprob],
) -> EchoedPrompt:
    """The prompt as the client sent it, with the offset of each token in it.

    The text of the ids may begin with a BOS or a blank that the client did not send."""
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
    pieces = [detokenizer.push([id]) for id in ids] + [detokenizer.flush()]
    offsets = [0, *accumulate(map(len, pieces))]
    text = "".join(pieces)
    num_added = 0
    if isinstance(prompt, str) and text.endswith(prompt):
        num_added = len(text) - len(prompt)
    placed = [
        replace(token, text_offset=max(0, offset - num_added))
        for token, offset in zip(logprobs, offsets[1:])
    ]
    return EchoedPrompt(text[num_added:], ids[0], placed)
