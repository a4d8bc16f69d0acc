"""What crosses the wall between the server process and the engine process: ids, numbers and codes.

Encoded with msgpack, one frame a message (queues.py).  The request number is the server's own,
never anything that a client chose.  Times are time.monotonic seconds, the same clock on both sides.

Every Submit is answered by exactly one terminal event a choice: its Finished, or the one Failed
that ends all choices of the request that have not finished.
"""

import math

import msgspec


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """How the next token is drawn; names and neutral values as everywhere in the field."""

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
    num_logprobs: int = -1  # -1: none; 0: the sampled token's; k: k alternatives beside it


class Submit(msgspec.Struct, frozen=True, array_like=True, tag="submit"):
    """A request to generate, accepted by the server."""

    request: int  # given by EngineClient.submit
    prompt_ids: list[int]
    max_tokens: int
    end_ids: list[int]  # a sampled id among these ends the choice with "stop"
    sampling: Sampling
    n: int = 1  # choices, each with its own choice index in the draw
    salt: bytes = b""  # requests of different salts share nothing of the prefix cache
    min_tokens: int = 0  # no end id is sampled before so many tokens
    grammar: str = ""  # source for engine/grammar.py, which every choice follows; none if empty
    priority: int = 0  # lower ones are scheduled earlier
    tenant: bytes = b""  # whose it is; tenants of equal priority get equal shares
    deadline_s: float = math.inf  # what has not finished by then fails
    prompt_logprobs: bool = False  # also Tokens of choice PROMPT, if num_logprobs is not -1


class Abort(msgspec.Struct, frozen=True, array_like=True, tag="abort"):
    """Ends a request, or one choice of it, at once; one that is unknown has just ended."""

    request: int
    choice: int | None = None


class Stop(msgspec.Struct, frozen=True, array_like=True, tag="stop"):
    """Ends the engine process in order."""


class Ready(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    """The model is loaded and steps are being made."""

    architecture: str
    backend: str
    backend_reason: str
    vocab_size: int
    context_length: int  # tokens of prompt and output together that one sequence may have
    max_num_sequence: int
    num_blocks: int  # usable KV blocks
    block_size: int
    load_s: float


class Refused(msgspec.Struct, frozen=True, array_like=True, tag="refused"):
    """The engine cannot run this model; starting it again would not help."""

    message: str


class Admitted(msgspec.Struct, frozen=True, array_like=True):
    """A choice of the request has become part of a step; it may come for each of them."""

    request: int
    num_cached_tokens: int  # of the prompt, found in the prefix cache


PROMPT = -1  # no choice: the prompt that all of them begin with


class Tokens(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of one choice, an end id included; of PROMPT, all of the prompt but its first, in
    order and before any choice's.

    logprobs and alternatives are as long as ids, or empty when nothing was asked for.
    """

    request: int
    choice: int
    ids: list[int]
    logprobs: list[float]
    alternatives: list[list[tuple[int, float]]]  # most likely first


class Finished(msgspec.Struct, frozen=True, array_like=True):
    """A choice ended.  reason: "stop" (an end id), "length" (max_tokens or context) or "abort".

    A time of 0 says that the choice ended before it came to that.
    """

    request: int
    choice: int
    reason: str
    num_prompt_tokens: int
    num_output_tokens: int
    queued_s: float  # when the engine received it
    scheduled_s: float  # when it first was part of a step
    first_token_s: float
    last_token_s: float
    num_preemptions: int = 0  # how often its blocks went to others


class Failed(msgspec.Struct, frozen=True, array_like=True):
    """A request ended with an error; the rest is that of errors.ApiError."""

    request: int
    status: int
    message: str
    param: str | None = None
    code: str | None = None


class Gauges(msgspec.Struct, frozen=True, array_like=True):
    """How the engine is now.  running and waiting count sequences: a choice is one."""

    running: int = 0
    waiting: int = 0
    used_blocks: int = 0
    total_blocks: int = 0
    num_preemptions: int = 0  # since the engine started, as the following
    num_prefix_queries: int = 0  # prompt tokens looked up in the prefix cache
    num_prefix_hits: int = 0  # and found there
    num_drafts: int = 0  # of speculative decoding
    num_draft_tokens: int = 0  # in them
    num_accepted_tokens: int = 0  # of these


class Step(msgspec.Struct, frozen=True, array_like=True, tag="step"):
    """Everything that one step brought, in one frame; to be taken in the order of its fields."""

    admitted: list[Admitted]
    tokens: list[Tokens]
    finished: list[Finished]
    failed: list[Failed]
    gauges: Gauges


ToEngine = Submit | Abort | Stop
FromEngine = Ready | Refused | Step
