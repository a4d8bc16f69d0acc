"""Rejects requests that the engine can never compute."""

from collections.abc import Iterable

from llmsrv.engine.messages import Sampling
from llmsrv.engine.messages import Submit
from llmsrv.errors import ApiError

# Parameter -> smallest and largest value.  The API allows less; the sampling table holds all of it.
# A comparison with NaN is false, so NaN is out of every range.
RANGES = {
    "seed": (0, 2**64 - 1),
    "temperature": (0.0, 1e6),
    "top_k": (0, 2**31 - 1),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "typical_p": (0.0, 1.0),
    "repetition_penalty": (1e-3, 1e3),
    "presence_penalty": (-1e3, 1e3),
    "frequency_penalty": (-1e3, 1e3),
    "num_logprobs": (-1, 2**31 - 1),
}
MAX_BIAS = 1000


def check_submit(submit: Submit, context_length: int, vocab_size: int) -> None:
    """Raises ApiError if the request can never be computed."""
    num_prompt = len(submit.prompt_ids)
    if num_prompt + min(submit.max_tokens, 1) > context_length:
        raise ApiError(
            400,
            f"This model's maximum context length is {context_length} tokens. However, "
            f"the prompt has {num_prompt} tokens, and one is needed for the completion.",
            code="context_length_exceeded",
        )
    if num_prompt == 0:
        raise ApiError(400, "the prompt is empty; expected at least 1 token")
    if not 0 <= min(submit.prompt_ids) <= max(submit.prompt_ids) < vocab_size:
        raise ApiError(400, f"a token id of the prompt is not in [0, {vocab_size})")
    if submit.max_tokens < 0 or submit.n < 1:
        raise ApiError(400, "max_tokens must be at least 0 and n at least 1")
    _check_ids("stop_token_ids", submit.end_ids, vocab_size)
    _check_sampling(submit.sampling, vocab_size)
    _check_min_tokens(submit)


def _check_sampling(sampling: Sampling, vocab_size: int) -> None:
    """Raises ApiError that names the first parameter out of its range."""
    for name, (smallest, largest) in RANGES.items():
        value = getattr(sampling, name)
        if not smallest <= value <= largest:
            raise _invalid_value(name, f"a value from {smallest} to {largest}", value)
    _check_ids("logit_bias", sampling.logit_bias, vocab_size)
    _check_ids("allowed_token_ids", sampling.allowed_ids, vocab_size)
    for bias in sampling.logit_bias.values():
        if not abs(bias) <= MAX_BIAS:
            raise _invalid_value("logit_bias", f"values from -{MAX_BIAS} to {MAX_BIAS}", bias)


def _check_min_tokens(submit: Submit) -> None:
    """Raises ApiError if min_tokens must come before an end id, but only end ids are allowed."""
    allowed = submit.sampling.allowed_ids
    if submit.min_tokens and allowed and set(allowed) <= set(submit.end_ids):
        raise _invalid_value("allowed_token_ids", "others than ends, for 'min_tokens'", allowed[:8])


def _check_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    """Raises ApiError if one of the ids is not in the vocabulary."""
    for id in ids:
        if not 0 <= id < vocab_size:
            raise _invalid_value(name, f"token ids below {vocab_size}", id)


def _invalid_value(name: str, expected: str, got: object) -> ApiError:
    message = f"Invalid '{name}': expected {expected}, but got {got}."
    return ApiError(400, message, param=name, code="invalid_value")
