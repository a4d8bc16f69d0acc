"""Writes a request's sampling parameters into the backend's sampling table."""

from llmsrv.backend.sampling.table import Mask
from llmsrv.backend.sampling.table import SamplingParameters
from llmsrv.backend.sampling.table import SamplingTable
from llmsrv.backend.sampling.table import mask_of
from llmsrv.engine.sequence import Sequence


def write_sampling(table: SamplingTable, sequence: Sequence) -> None:
    """Sets the parameters and the tokens so far of the sequence's slot.

    The parameters must have passed check_submit.
    """
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
    """How many of a grammar's masks, for the sequence's next rows, come before the first one that
    becomes empty when allowed_token_ids and min_tokens apply too."""
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
