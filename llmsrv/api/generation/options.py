"""How to generate, whatever the dialect of the request: the annotations are the one table of
limits.

A dialect's request type inherits from GenerationOptions and adds its own fields.  Limits that
depend on the model (its context, its vocabulary) are checked in submit.py and by the engine.
"""

from typing import Annotated
from typing import Literal

import msgspec
from msgspec import Meta

INT32 = 2**31
INT64 = 2**63

TokenId = Annotated[int, Meta(ge=0, le=INT32 - 1)]
TokenCount = Annotated[int, Meta(ge=1, le=INT32 - 1)]
NumAlternatives = Annotated[int, Meta(ge=-1, le=20)]  # -1: all
StopString = Annotated[str, Meta(min_length=1, max_length=1024)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Bias = Annotated[float, Meta(ge=-100, le=100)]


class RepetitionDetection(msgspec.Struct):
    """vLLM's: end the answer if it ends with min_count times the same pattern of tokens.  A
    max_pattern_size of 0 turns it off."""

    max_pattern_size: Annotated[int, Meta(ge=0, le=1024)] = 0
    min_pattern_size: Annotated[int, Meta(ge=0, le=1024)] = 0
    min_count: Annotated[int, Meta(ge=0, le=INT32 - 1)] = 0


class GenerationOptions(msgspec.Struct, kw_only=True):
    """None means the default: the model's own for sampling parameters, otherwise the server's.

    Fields of vLLM that OpenAI does not have keep the names they have there.
    """

    max_tokens: TokenCount | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=INT32 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[TokenId, Bias], Meta(max_length=1024)] | None = None
    allowed_token_ids: Annotated[list[TokenId], Meta(min_length=1, max_length=2**18)] | None = None
    seed: Annotated[int, Meta(ge=-INT64, le=INT64 - 1)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=16)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=128)] | None = None
    include_stop_str_in_output: bool | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=INT32 - 1)] | None = None
    ignore_eos: bool | None = None
    repetition_detection: RepetitionDetection | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: NumAlternatives | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=INT32 - 1)] | None = None
    truncation_side: Literal["left", "right"] | None = None  # the side that is cut off
    priority: Annotated[int, Meta(ge=-INT32, le=INT32 - 1)] | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=1024)] | None = None
