"""What the routes that generate have in common: from a request's fields to what the engine is asked
for, checked against the model and the server's options."""

import hashlib
import math
import secrets
import time
from collections.abc import Mapping

from llmsrv.api.generation.options import GenerationOptions
from llmsrv.api.generation.output import TextRules
from llmsrv.asgi.request import Request
from llmsrv.engine.messages import Sampling
from llmsrv.engine.messages import Submit
from llmsrv.errors import ApiError
from llmsrv.errors import invalid
from llmsrv.registry.service import Service
from llmsrv.text.tokenizer import Tokenizer

MAX_CHOICES = 1024  # of one request
MAX_OUTPUT_TOKENS = 1 << 22  # of one request, all its choices together
MAX_PROMPT_LOGPROBS = 1 << 18  # of one request, some 20 MB of answer
INLINE_CHARS = 4096  # longer texts are tokenised in a thread: about 1 ms of the loop's time


def tenant_of(request: Request) -> bytes:
    tenant: bytes = request.state.get("tenant", b"")
    return tenant


def make_submits(
    service: Service,
    request: GenerationOptions,
    prompts: list[list[int]],
    max_tokens: list[int],
    *,
    n: int,
    num_logprobs: int,
    wants_prompt_logprobs: bool,
    tenant: bytes,
    grammar: str = "",
) -> list[Submit]:
    """What the engine is asked for, a Submit a prompt.

    num_logprobs  alternatives at each token that is told; -1 for no log-probabilities at all
    tenant        requests of different tenants share no prefix, so none can time another's
    """
    check_budget(prompts, max_tokens, n, 1 + num_logprobs if wants_prompt_logprobs else 0)
    sampling = sampling_of(request, service.text.sampling_defaults, num_logprobs)
    timeout_s = service.config.request_timeout_s
    deadline_s = time.monotonic() + timeout_s if timeout_s else math.inf
    return [
        Submit(
            request=0,
            prompt_ids=ids,
            max_tokens=limit,
            end_ids=_end_ids(request, service.text.tokenizer),
            sampling=sampling,
            n=n,
            salt=_salt(tenant, request.cache_salt),
            min_tokens=min(request.min_tokens or 0, limit),
            grammar=grammar,
            priority=request.priority or 0,
            tenant=tenant,
            deadline_s=deadline_s,
            prompt_logprobs=wants_prompt_logprobs,
        )
        for ids, limit in zip(prompts, max_tokens, strict=True)
    ]


def check_budget(
    prompts: list[list[int]], max_tokens: list[int], n: int, num_prompt_logprobs: int
) -> None:
    """ApiError 400 for more than one request may ask for.

    num_prompt_logprobs  log-probabilities of each token of the prompts
    """
    num_prompt_logprobs *= sum(map(len, prompts))
    for param, number, most, what in (
        ("n", len(prompts) * n, MAX_CHOICES, "choices"),
        ("max_tokens", sum(max_tokens) * n, MAX_OUTPUT_TOKENS, "tokens of output"),
        (
            "prompt_logprobs",
            num_prompt_logprobs,
            MAX_PROMPT_LOGPROBS,
            "log-probabilities of prompts",
        ),
    ):
        if number > most:
            raise invalid(param, f"expected at most {most} {what} in all, but got {number}")


def text_rules(
    request: GenerationOptions,
    tokenizer: Tokenizer,
    shown: frozenset[int] = frozenset(),
    is_thinking: bool | None = None,
) -> TextRules:
    """shown, is_thinking: as in TextRules."""
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    return TextRules(
        stops=stops,
        keeps_stop=bool(request.include_stop_str_in_output),
        end_ids=frozenset(_end_ids(request, tokenizer)),
        min_tokens=request.min_tokens or 0,
        skip_special=request.skip_special_tokens is not False,
        shown=shown,
        is_thinking=is_thinking,
    )


def _end_ids(request: GenerationOptions, tokenizer: Tokenizer) -> list[int]:
    end_ids = [] if request.ignore_eos else sorted(tokenizer.end_ids)
    return end_ids + (request.stop_token_ids or [])


def _salt(tenant: bytes, cache_salt: str | None) -> bytes:
    if cache_salt is None:
        return tenant
    return hashlib.blake2b(cache_salt.encode(), key=tenant[:64], digest_size=16).digest()


def sampling_of(
    request: GenerationOptions, defaults: Mapping[str, float], num_logprobs: int
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


def truncated(service: Service, request: GenerationOptions, ids: list[int]) -> list[int]:
    """The end of a prompt, as long as truncate_prompt_tokens says; -1: as the context allows."""
    asked = request.truncate_prompt_tokens
    if asked is None:
        return ids
    assert service.engine.ready is not None
    most = service.engine.ready.context_length - (request.max_tokens or 1)
    return ids[-(max(1, most) if asked < 1 else asked) :]


def refuse_too_long(service: Service, tokenizer: Tokenizer, text: str, param: str) -> None:
    """Refuses before any work a text whose length alone shows that it cannot fit the context."""
    assert service.engine.ready is not None
    at_least = len(text) // tokenizer.longest_token
    if at_least >= service.engine.ready.context_length:
        output_limit(service, at_least, None, None, param)
