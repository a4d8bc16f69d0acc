"""From a request's sampling parameters to the backend's table of them."""

from collections.abc import Iterable

from llmsrv.backend.sampling.table import Mask
from llmsrv.backend.sampling.table import mask_of
from llmsrv.backend.sampling.table import SamplingParameters
from llmsrv.backend.sampling.table import SamplingTable
from llmsrv.engine.messages import Sampling
from llmsrv.engine.messages import Submit
from llmsrv.engine.sequence import Sequence
from llmsrv.errors import ApiError

# Parameter -> least and largest value; what the API allows is narrower, what the table holds is not
# wider.  A comparison with NaN is false, so NaN is out of every range.
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
    "num_logprobs": (-1, 1000),
}
MAX_BIAS = 1000


def check_sampling(sampling: Sampling, vocab_size: int) -> None:
    """Raises ApiError naming the first parameter that is out of its range."""
    for name, (least, largest) in RANGES.items():
        value = getattr(sampling, name)
        if not least <= value <= largest:
            raise _invalid(name, f"a value from {least} to {largest}", value)
    check_ids("logit_bias", sampling.logit_bias, vocab_size)
    check_ids("allowed_token_ids", sampling.allowed_ids, vocab_size)
    for bias in sampling.logit_bias.values():
        if not abs(bias) <= MAX_BIAS:
            raise _invalid("logit_bias", f"values from -{MAX_BIAS} to {MAX_BIAS}", bias)


def check_min_tokens(submit: Submit) -> None:
    """Raises ApiError when every id that is allowed is an end, before which others must come."""
    allowed = submit.sampling.allowed_ids
    if submit.min_tokens and allowed and set(allowed) <= set(submit.end_ids):
        raise _invalid("allowed_token_ids", "others than ends, for 'min_tokens'", allowed[:8])


def check_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    """Raises ApiError when one of the ids is not in the vocabulary."""
    for id in ids:
        if not 0 <= id < vocab_size:
            raise _invalid(name, f"token ids below {vocab_size}", id)


def _invalid(name: str, expected: str, got: object) -> ApiError:
    message = f"Invalid '{name}': expected {expected}, but got {got}."
    return ApiError(400, message, param=name, code="invalid_value")


def write_sampling(table: SamplingTable, sequence: Sequence) -> None:
    """Gives the sequence's slot its parameters, which check_sampling has passed, and its tokens."""
    sampling, submit = sequence.submit.sampling, sequence.submit
    allowed = mask_of(sampling.allowed_ids, table.vocab_size) if sampling.allowed_ids else None
    table.set(
        sequence.slot,
        SamplingParameters(
            seed=sampling.seed,
            choice=sequence.choice,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            typical_p=sampling.typical_p,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            num_logprobs=sampling.num_logprobs,
            logit_bias=sampling.logit_bias,
            allowed=allowed,
            min_tokens=submit.min_tokens,
            end_ids=submit.end_ids,
        ),
        submit.prompt_ids,
        sequence.output_ids,
    )


def num_usable_masks(table: SamplingTable, sequence: Sequence, masks: Mask) -> int:
    """How many of a grammar's masks for the sequence's next rows come before the first one of which
    its allowed ids and its min_tokens leave nothing."""
    extras = table.extras.get(sequence.slot)
    if extras is None:
        return len(masks)
    num_without_end = extras.min_tokens - len(sequence.output_ids)
    if extras.allowed is not None:
        masks = masks & extras.allowed
    elif num_without_end <= 0:
        return len(masks)
    no_end = ~mask_of(sequence.submit.end_ids, table.vocab_size)
    for row, mask in enumerate(masks):
        if not (mask & no_end if row < num_without_end else mask).any():
            return row
    return len(masks)
