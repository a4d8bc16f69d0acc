"""From the options and prompts of a request to what the engine gets, checked against the model."""

import asyncio
import hashlib
import math
import secrets
import time
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from typing import TypeVar

from llmsrv.api.generation.answer_parser import NO_IDS
from llmsrv.api.generation.answer_parser import visible_special_tokens
from llmsrv.api.generation.options import GenerationOptions
from llmsrv.api.generation.output import OutputRules
from llmsrv.api.generation.tools import ToolUse
from llmsrv.asgi.request import Request
from llmsrv.engine.messages import RepetitionDetection
from llmsrv.engine.messages import Sampling
from llmsrv.engine.messages import Submit
from llmsrv.errors import ApiError
from llmsrv.errors import invalid
from llmsrv.registry.service import Service
from llmsrv.text.tokenizer import Tokenizer

MAX_CHOICES = 1024  # of one request
MAX_OUTPUT_TOKENS = 1 << 22  # of one request, all its choices together
MAX_PROMPT_LOGPROBS = 1 << 18  # of one request, some 20 MB of answer
MAX_ALTERNATIVES = 20  # unless a request asks for all
CUT_TOKENS = 64  # next to a cut in a text, whose ids may not be those of the whole text
CHARS_PER_TOKEN = 6  # of most texts less
INLINE_CHARS = 4096  # longer texts are tokenised in a thread: about 1 ms of the loop's time

T = TypeVar("T")
_threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenise")


def tenant_of(request: Request) -> bytes:
    tenant: bytes = request.state.get("tenant", b"")
    return tenant


def make_submits(
    service: Service,
    options: GenerationOptions,
    prompts: Sequence[list[int]],
    max_tokens: Sequence[int],
    *,
    n: int,
    num_logprobs: int,
    wants_prompt_logprobs: bool,
    tenant: bytes,
    grammar: str = "",
) -> list[Submit]:
    """One Submit per prompt.

    max_tokens    of each prompt's choices
    num_logprobs  alternatives per token; -1: no log-probabilities
    tenant        requests of different tenants share no prefix, so that none can time another's
    Raises ApiError 400 as check_budget().
    """
    check_budget(prompts, max_tokens, n, 1 + num_logprobs if wants_prompt_logprobs else 0)
    if num_logprobs > MAX_ALTERNATIVES:
        _check_logprobs((1 + num_logprobs) * sum(max_tokens) * n)
    sampling = sampling_of(options, service.text.sampling_defaults, num_logprobs)
    timeout_s = service.config.request_timeout_s
    deadline_s = time.monotonic() + timeout_s if timeout_s else math.inf
    return [
        Submit(
            request=0,
            prompt_ids=ids,
            max_tokens=limit,
            end_ids=sorted(_end_ids(options, service.text.tokenizer)),
            sampling=sampling,
            n=n,
            salt=_salt(tenant, options.cache_salt),
            min_tokens=min(options.min_tokens or 0, limit),
            grammar=grammar,
            priority=options.priority or 0,
            tenant=tenant,
            deadline_s=deadline_s,
            repetition_detection=_repetition_detection(options),
            prompt_logprobs=wants_prompt_logprobs,
        )
        for ids, limit in zip(prompts, max_tokens, strict=True)
    ]


def check_budget(
    prompts: Sequence[list[int]], max_tokens: Sequence[int], n: int, num_prompt_logprobs: int
) -> None:
    """ApiError 400 if one request asks for too much.

    num_prompt_logprobs  log-probabilities per prompt token
    """
    num_prompt_logprobs *= sum(map(len, prompts))
    for param, number, most, unit in (
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
            raise invalid(param, f"expected at most {most} {unit} in all, but got {number}")


def _check_logprobs(number: int) -> None:
    if number > MAX_PROMPT_LOGPROBS:
        most = MAX_PROMPT_LOGPROBS
        reason = f"expected at most {most} log-probabilities in all, but got {number}"
        raise invalid("top_logprobs", reason)


def output_rules(
    options: GenerationOptions,
    tokenizer: Tokenizer,
    tools: ToolUse | None = None,
    is_thinking: bool | None = None,
) -> OutputRules:
    """tools, is_thinking: as in OutputRules."""
    return OutputRules(
        stop_strings=[options.stop] if isinstance(options.stop, str) else options.stop or (),
        includes_stop=bool(options.include_stop_str_in_output),
        end_ids=_end_ids(options, tokenizer),
        min_tokens=options.min_tokens or 0,
        skip_special_tokens=options.skip_special_tokens is not False,
        visible_special_ids=visible_special_tokens(tokenizer, tools, is_thinking),
        tools=tools,
        is_thinking=is_thinking,
    )


def _end_ids(options: GenerationOptions, tokenizer: Tokenizer) -> frozenset[int]:
    end_ids = NO_IDS if options.ignore_eos else tokenizer.end_ids
    return end_ids | set(options.stop_token_ids) if options.stop_token_ids else end_ids


def _repetition_detection(options: GenerationOptions) -> RepetitionDetection | None:
    wanted = options.repetition_detection
    if wanted is None or not wanted.max_pattern_size:
        return None
    return RepetitionDetection(
        wanted.max_pattern_size, wanted.min_pattern_size, wanted.min_count
    )


def _salt(tenant: bytes, cache_salt: str | None) -> bytes:
    if cache_salt is None:
        return tenant
    return hashlib.blake2b(cache_salt.encode(), key=tenant[:64], digest_size=16).digest()


def sampling_of(
    options: GenerationOptions, defaults: Mapping[str, float], num_logprobs: int
) -> Sampling:
    """The sampling parameters for the engine.

    Parameters that the request leaves out come from `defaults`, the model's own.  Without a seed,
    the seed is random.
    """

    def value(name: str, neutral: float) -> float:
        own: float | None = getattr(options, name)
        return defaults.get(name, neutral) if own is None else own

    return Sampling(
        seed=secrets.randbits(64) if options.seed is None else options.seed % 2**64,
        temperature=value("temperature", 1.0),
        top_k=max(int(value("top_k", 0)), 0),
        top_p=value("top_p", 1.0),
        min_p=value("min_p", 0.0),
        typical_p=value("typical_p", 1.0),
        repetition_penalty=value("repetition_penalty", 1.0),
        presence_penalty=value("presence_penalty", 0.0),
        frequency_penalty=value("frequency_penalty", 0.0),
        logit_bias=options.logit_bias or {},
        allowed_ids=options.allowed_token_ids or [],
        num_logprobs=num_logprobs,
    )


def num_alternatives(service: Service, wanted: int | None) -> int | None:
    """As many as a request wants; -1: the whole vocabulary."""
    assert service.engine.ready is not None
    return service.engine.ready.vocab_size if wanted == -1 else wanted


# ---- Prompts and the context


def max_output_tokens(
    service: Service, num_prompt_tokens: int, wanted: int | None, default: int | None, param: str
) -> int:
    """How many tokens may follow a prompt.

    wanted   what the request asks for; else `default`, else all that the context leaves
    param    the field of the prompt
    Raises ApiError 400 context_length_exceeded if prompt and output do not fit the context.
    """
    assert service.engine.ready is not None
    context = service.engine.ready.context_length
    left = context - num_prompt_tokens
    least = 1 if wanted is None else wanted
    if left < least:
        raise ApiError(
            400,
            f"This model's maximum context length is {context} tokens. However, you requested "
            f"{num_prompt_tokens + least} tokens ({num_prompt_tokens} in the {param}, "
            f"{least} in the completion). Please reduce the length of the {param}"
            + (" or the completion." if wanted else "."),
            param=param,
            code="context_length_exceeded",
        )
    return min(left, default or left) if wanted is None else wanted


def truncate_prompt(service: Service, options: GenerationOptions, ids: list[int]) -> list[int]:
    """The last truncate_prompt_tokens of a prompt, or the first if its right side is cut off; -1:
    as many as the context leaves room for."""
    num_kept = options.truncate_prompt_tokens
    if num_kept is None:
        return ids
    assert service.engine.ready is not None
    num_wanted = 1 if options.max_tokens is None else options.max_tokens
    most = service.engine.ready.context_length - num_wanted
    num_kept = max(1, most) if num_kept < 1 else num_kept
    return ids[:num_kept] if options.truncation_side == "right" else ids[-num_kept:]


def encode_kept(service: Service, options: GenerationOptions, text: str) -> list[int]:
    """The ids of the part of a text that can matter for a prompt that is truncated, and of some
    more: next to the cut, ids may not be those of the whole text.

    It takes memory for the tokens that are kept, however long the text is.
    """
    assert service.engine.ready is not None
    num_kept = service.engine.ready.context_length
    if (wanted := options.truncate_prompt_tokens) is not None and wanted > 0:
        num_kept = min(num_kept, wanted)
    num_ids = num_kept + CUT_TOKENS
    num_chars = num_ids * CHARS_PER_TOKEN
    while True:
        part = text[:num_chars] if options.truncation_side == "right" else text[-num_chars:]
        ids = service.text.tokenizer.encode(part, parse_special=True)
        if len(ids) >= num_ids or num_chars >= len(text):
            return ids
        num_chars *= 2


async def tokenise_in_thread(tokenise: Callable[..., T], *arguments: Any) -> T:
    """For texts longer than INLINE_CHARS.  A token takes 150 bytes meanwhile, so that few of them
    may be tokenised at once."""
    return await asyncio.get_running_loop().run_in_executor(_threads, tokenise, *arguments)


def check_fits_context(service: Service, num_chars: int, param: str) -> None:
    """ApiError 400 for a text whose length alone shows that it cannot fit, before any work on
    it."""
    assert service.engine.ready is not None
    at_least = num_chars // service.text.tokenizer.max_token_chars
    if at_least >= service.engine.ready.context_length:
        max_output_tokens(service, at_least, None, None, param)
