"""The messages between the server process and the engine process: ids, numbers and codes.

Messages are encoded with msgpack, one per frame (queues.py).  The server assigns the request
numbers; they are never chosen by a client.  Times are time.monotonic seconds, which both processes
share.

Each choice of a Submit gets exactly one terminal event: its Finished, or the request's one Failed,
which ends all choices that have not finished.
"""

import math

import msgspec


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """Sampling parameters, with the names and neutral values that are common in the field."""

    seed: int  # 0 .. 2**64 - 1
    temperature: float = 1.0  # 0: the largest logit
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    allowed_ids: list[int] = []  # empty: all
    num_logprobs: int = -1  # -1: none; 0: the sampled token's; k: and k alternatives


class RepetitionDetection(msgspec.Struct, frozen=True, array_like=True):
    """Ends a choice whose output repeats itself (repetition.py)."""

    max_pattern_size: int  # tokens
    min_pattern_size: int = 0
    min_count: int = 2


class Submit(msgspec.Struct, frozen=True, array_like=True, tag="submit"):
    """A request to generate, accepted by the server."""

    request: int  # given by EngineClient.submit
    prompt_ids: list[int]
    max_tokens: int  # 0: only the prompt is computed
    end_ids: list[int]  # sampling one of these ends the choice with "stop"
    sampling: Sampling
    n: int = 1  # choices; each draws with its own choice index
    salt: bytes = b""  # requests with different salts share no cached prefix
    min_tokens: int = 0  # no end id is sampled before this many tokens
    grammar: str = ""  # source for engine/grammar.py; empty: none
    priority: int = 0  # lower ones are scheduled earlier
    tenant: bytes = b""  # tenants of equal priority get equal shares
    deadline_s: float = math.inf  # the request fails if it has not finished by then
    repetition_detection: RepetitionDetection | None = None
    prompt_logprobs: bool = False  # also sends Tokens of choice PROMPT; needs num_logprobs


class Abort(msgspec.Struct, frozen=True, array_like=True, tag="abort"):
    """Ends a request or one of its choices at once; unknown requests have just ended."""

    request: int
    choice: int | None = None


class Stop(msgspec.Struct, frozen=True, array_like=True, tag="stop"):
    """Shuts the engine process down."""


class Ready(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    """The model is loaded and the engine takes requests."""

    architecture: str
    backend: str
    backend_reason: str
    vocab_size: int
    context_length: int  # limit of prompt and output tokens of a sequence
    max_num_sequence: int
    num_blocks: int  # usable KV blocks
    block_size: int
    load_s: float


class Refused(msgspec.Struct, frozen=True, array_like=True, tag="refused"):
    """The engine cannot run this model; restarting it would not help."""

    message: str


class Admitted(msgspec.Struct, frozen=True, array_like=True):
    """A choice of the request is scheduled for the first time; sent for each choice."""

    request: int
    num_cached_tokens: int  # prompt tokens found in the prefix cache


PROMPT = -1  # in place of a choice: the prompt that all choices share


class Tokens(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of one choice, including an end id.

    For PROMPT, all prompt tokens but the first, in order and before the tokens of any choice.
    logprobs, alternatives and ranks are as long as ids, or empty if they were not requested.
    """

    request: int
    choice: int
    ids: list[int]
    logprobs: list[float]
    alternatives: list[list[tuple[int, float]]]  # most likely first
    ranks: list[int] = []  # of the ids among all logits, from 1


class Finished(msgspec.Struct, frozen=True, array_like=True):
    """A choice ended.  reason: "stop" (an end id), "length" (max_tokens, context or a
    repetition) or "abort".

    A time is 0 if the choice ended before that event.
    """

    request: int
    choice: int
    reason: str
    num_prompt_tokens: int
    num_output_tokens: int
    queued_s: float  # when the engine received it
    scheduled_s: float  # when it was first part of a step
    first_token_s: float
    last_token_s: float
    num_preemptions: int = 0  # how often it was preempted


class Failed(msgspec.Struct, frozen=True, array_like=True):
    """A request ended with an error; for the fields see errors.ApiError."""

    request: int
    status: int
    message: str
    param: str | None = None
    code: str | None = None


class Gauges(msgspec.Struct, frozen=True, array_like=True):
    """The current state of the engine.  running and waiting count sequences, one per choice."""

    running: int = 0
    waiting: int = 0
    used_blocks: int = 0
    total_blocks: int = 0
    num_preemptions: int = 0  # since the engine started, like all counts below
    num_prefix_queries: int = 0  # tokens looked up in the prefix cache
    num_prefix_hits: int = 0  # tokens found there
    num_drafts: int = 0  # of speculative decoding
    num_draft_tokens: int = 0  # tokens in the drafts
    num_accepted_tokens: int = 0  # draft tokens that were accepted
    num_recomputed_tokens: int = 0  # tokens computed again after preemptions


class Step(msgspec.Struct, frozen=True, array_like=True, tag="step"):
    """All results of one step, in one frame; process them in the order of the fields."""

    admitted: list[Admitted]
    tokens: list[Tokens]
    finished: list[Finished]
    failed: list[Failed]
    gauges: Gauges


ToEngine = Submit | Abort | Stop
FromEngine = Ready | Refused | Step
