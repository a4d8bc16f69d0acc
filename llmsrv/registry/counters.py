"""The counters of each model, as plain numbers; api/operations/metrics.py exports them.

Names, units and buckets are vLLM's, with finer buckets added for small, fast models.  Each choice
counts as a request; what belongs to a prompt is counted once per prompt.
"""

import dataclasses
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from typing import Any

from llmsrv.engine.messages import Gauges
from llmsrv.engine.messages import PROMPT
from llmsrv.engine.messages import Step

REQUEST_S = (
    *(0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60),
    *(120, 240, 480, 960, 1920, 7680),
)
FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5),
    *(10, 20, 40, 80, 160, 640, 2560),
)
TOKEN_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80),
)
TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
STEP_TOKENS = (1, *(2**power for power in range(3, 15)))
CHOICES = (1, 2, 5, 10, 20)
PREEMPTIONS = (1, 2, 3, 4, 5, 10, 20)
# Counter -> the engine's gauge that counts the same since the engine started.
SINCE_START = {
    "prefix_cache_queries": "num_prefix_queries",
    "prefix_cache_hits": "num_prefix_hits",
    "num_preemptions": "num_preemptions",
    "preemption_recomputed_tokens": "num_recomputed_tokens",
    "spec_decode_num_drafts": "num_drafts",
    "spec_decode_num_draft_tokens": "num_draft_tokens",
    "spec_decode_num_accepted_tokens": "num_accepted_tokens",
}


class Histogram:
    """Counts of values by bucket, and their sum; a value equal to a bound is in its bucket."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # the last one is for values above all bounds
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times


def _number(help: str) -> Any:
    return dataclasses.field(default=0, metadata={"help": help})


def _histogram(bounds: Sequence[float], help: str) -> Any:
    return dataclasses.field(
        default_factory=lambda: Histogram(bounds), metadata={"help": help}
    )


@dataclasses.dataclass
class Counters:
    """One model's counters since the server started; restarts of its engine do not reset them.
    A field with a help text is exported as vllm:FIELD."""

    prompt_tokens: int = _number("Prompt tokens")
    generation_tokens: int = _number("Output tokens")
    prefix_cache_queries: int = _number("Prompt tokens looked up in the prefix cache")
    prefix_cache_hits: int = _number("Prompt tokens found in the prefix cache")
    admission_rejections: int = _number("Requests that the queue had no room for")
    num_preemptions: int = _number("Sequences that lost their blocks to others")
    preemption_recomputed_tokens: int = _number("Tokens computed again after preemptions")
    spec_decode_num_drafts: int = _number("Drafts of speculative decoding")
    spec_decode_num_draft_tokens: int = _number("Tokens of drafts")
    spec_decode_num_accepted_tokens: int = _number("Tokens of drafts that were kept")

    time_to_first_token_seconds: Histogram = _histogram(
        FIRST_TOKEN_S, "From a request to its first token"
    )
    inter_token_latency_seconds: Histogram = _histogram(TOKEN_S, "From one token to the next")
    request_time_per_output_token_seconds: Histogram = _histogram(
        TOKEN_S, "Between the tokens of a request, on average"
    )
    e2e_request_latency_seconds: Histogram = _histogram(REQUEST_S, "From a request to its end")
    request_queue_time_seconds: Histogram = _histogram(REQUEST_S, "From a request to its admission")
    request_prefill_time_seconds: Histogram = _histogram(
        REQUEST_S, "From admission to the first token"
    )
    request_decode_time_seconds: Histogram = _histogram(
        REQUEST_S, "From the first token to the last"
    )
    request_inference_time_seconds: Histogram = _histogram(
        REQUEST_S, "From admission to the last token"
    )
    request_prompt_tokens: Histogram = _histogram(TOKENS, "Tokens of a prompt")
    request_generation_tokens: Histogram = _histogram(TOKENS, "Tokens of a choice")
    request_max_num_generation_tokens: Histogram = _histogram(
        TOKENS, "Tokens of the longest choice of a prompt"
    )
    request_num_preemptions: Histogram = _histogram(
        PREEMPTIONS, "How often a choice lost its blocks to others"
    )
    request_params_n: Histogram = _histogram(CHOICES, "Choices asked for")
    request_params_max_tokens: Histogram = _histogram(TOKENS, "Output tokens asked for at most")
    iteration_tokens_total: Histogram = _histogram(STEP_TOKENS, "Tokens of a step of the engine")

    finished: Counter[str] = dataclasses.field(default_factory=Counter)  # choices by finish reason
    gauges: Gauges = Gauges()  # of the last step

    def note_step(self, step: Step, num_prompt_tokens: int) -> None:
        """num_prompt_tokens: those of the requests that were admitted in this step."""
        sampled = (len(tokens.ids) for tokens in step.tokens if tokens.choice != PROMPT)
        if num_tokens := num_prompt_tokens + sum(sampled):
            self.iteration_tokens_total.observe(num_tokens)
        for name, gauge in SINCE_START.items():
            growth = _increase(getattr(step.gauges, gauge), getattr(self.gauges, gauge))
            setattr(self, name, getattr(self, name) + growth)
        self.gauges = step.gauges

    def note_prompt(self, num_tokens: int, n: int, max_tokens: int, longest: int) -> None:
        """At its end; its tokens are counted when it is admitted."""
        self.request_prompt_tokens.observe(num_tokens)
        self.request_params_n.observe(n)
        self.request_params_max_tokens.observe(max_tokens)
        self.request_max_num_generation_tokens.observe(longest)


def _increase(now: int, before: int) -> int:
    """The increase of an engine's count; a smaller count comes from a restarted engine."""
    return now - before if now >= before else now


class ChoiceClock:
    """Records one choice's tokens, their times and its end in the counters.  Times are
    time.monotonic's."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._begun_s = time.monotonic()
        self._first_s = 0.0
        self._last_s = 0.0
        self._num_counted = 0

    def note_output(self, num_tokens: int) -> None:
        """num_tokens: of the choice so far, without what follows a stop string."""
        self._counters.generation_tokens += num_tokens - self._num_counted
        self._num_counted = num_tokens

    def note_tokens(self, num_tokens: int, received_s: float) -> None:
        """num_tokens: that arrived together."""
        if not self._last_s:
            self._first_s = self._last_s = received_s
            self._counters.time_to_first_token_seconds.observe(received_s - self._begun_s)
            num_tokens -= 1
        if num_tokens:
            gap_s = (received_s - self._last_s) / num_tokens
            self._counters.inter_token_latency_seconds.observe(gap_s, num_tokens)
            self._last_s = received_s

    def note_end(self, reason: str, num_tokens: int, admitted_s: float | None) -> None:
        counters = self._counters
        counters.finished[reason] += 1
        self.note_output(num_tokens)
        counters.request_generation_tokens.observe(num_tokens)
        counters.e2e_request_latency_seconds.observe(time.monotonic() - self._begun_s)
        if admitted_s is not None:
            counters.request_queue_time_seconds.observe(admitted_s - self._begun_s)
        if admitted_s is not None and self._first_s:
            counters.request_prefill_time_seconds.observe(self._first_s - admitted_s)
            counters.request_decode_time_seconds.observe(self._last_s - self._first_s)
            counters.request_inference_time_seconds.observe(self._last_s - admitted_s)
            if num_tokens > 1:
                average_s = (self._last_s - self._first_s) / (num_tokens - 1)
                counters.request_time_per_output_token_seconds.observe(average_s)
