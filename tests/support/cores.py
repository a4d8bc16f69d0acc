"""An engine core without its process, on a plan that detects every wrong block and position."""

import time
from collections.abc import Callable

from llmsrv.backend.base import BLOCK_SIZE
from llmsrv.backend.base import Limits
from llmsrv.backend.base import Plan
from llmsrv.engine.core import EngineCore
from llmsrv.engine.messages import Failed
from llmsrv.engine.messages import Finished
from llmsrv.engine.messages import Gauges
from llmsrv.engine.messages import Sampling
from llmsrv.engine.messages import Step
from llmsrv.engine.messages import Submit
from llmsrv.engine.scheduler import NUM_RECENT_OUTPUTS
from tests.support.fake_plan import FakePlan
from tests.support.fake_plan import NAN_ID
from tests.support.fake_plan import VOCAB_SIZE
from tests.support.fake_plan import next_id

GREEDY = Sampling(seed=0, temperature=0.0)


class Engine:
    """An engine core on a fake plan, and everything that its steps have reported."""

    def __init__(
        self,
        *,
        max_sequences: int = 4,
        blocks: int = 64,
        max_rows: int = 32,
        context: int = 200,
        make_plan: Callable[[Limits], Plan] = FakePlan,
        clock: Callable[[], float] = time.monotonic,
        spare_logit_rows: int = 0,
        draft_length: int | None = None,
        make_draft_plan: Callable[[Limits], Plan] | None = None,
        is_pipelined: bool | None = None,
        max_step_s: float = 0.05,
        recent_output_tokens: int = 0,
    ) -> None:
        """draft_length: as in Speculation; None: no prompt lookup.  make_draft_plan: makes the plan
        of a draft model, which replaces prompt lookup.  recent_output_tokens: the length of recent
        outputs; 0: sequences are admitted while there are blocks, and preempted when they grow."""
        limits = Limits(max_rows, max_sequences + spare_logit_rows, max_sequences, blocks + 1)
        self.plan = make_plan(limits)
        context_length = min(context, blocks * BLOCK_SIZE)
        self.core = EngineCore(
            self.plan,
            limits,
            context_length,
            VOCAB_SIZE,
            clock=clock,
            uses_prompt_lookup=draft_length is not None and make_draft_plan is None,
            draft_plan=make_draft_plan(limits) if make_draft_plan else None,
            draft_length=draft_length or 0,
            is_pipelined=is_pipelined,
            max_step_s=max_step_s,
        )
        recent_outputs = self.core._scheduler.recent_outputs
        recent_outputs.extend([recent_output_tokens] * NUM_RECENT_OUTPUTS)
        self.admitted: list[int] = []
        self.num_cached: list[int] = []  # cached tokens of each admission
        self.outputs: dict[tuple[int, int], list[int]] = {}
        self.finished: dict[tuple[int, int], Finished] = {}
        self.failed: dict[int, Failed] = {}
        self.gauges = Gauges()

    def submit(self, request: int, prompt: list[int], **fields: object) -> Submit:
        values = {"max_tokens": 10, "end_ids": [], "sampling": GREEDY, **fields}
        submit = Submit(request=request, prompt_ids=prompt, **values)  # type: ignore[arg-type]
        self.core.submit(submit)
        return submit

    def step(self) -> Step:
        step = self.core.step()
        self.admitted += [admitted.request for admitted in step.admitted]
        self.num_cached += [admitted.num_cached_tokens for admitted in step.admitted]
        for tokens in step.tokens:
            key = tokens.request, tokens.choice
            assert key not in self.finished and tokens.request not in self.failed
            self.outputs.setdefault(key, []).extend(tokens.ids)
        for finished in step.finished:
            key = finished.request, finished.choice
            assert key not in self.finished and finished.request not in self.failed
            self.finished[key] = finished
        for failed in step.failed:
            assert failed.request not in self.failed
            self.failed[failed.request] = failed
        self.gauges = step.gauges
        return step

    def run(self, max_steps: int = 10_000) -> None:
        for _ in range(max_steps):
            if not self.core.has_work:
                return
            self.step()
        raise AssertionError(f"no end after {max_steps} steps")

    def assert_idle(self) -> None:
        """Asserts that no block is in use and none is lost."""
        cache = self.core._kv_cache
        assert cache.num_free == cache.num_total and cache.num_used == 0
        assert (cache.block_tables == 0).all()
        assert (self.gauges.running, self.gauges.waiting, self.gauges.used_blocks) == (0, 0, 0)
        assert self.gauges.total_blocks == cache.num_total


def alone(submit: Submit, choice: int = 0, context: int = 200) -> tuple[list[int], str | None]:
    """The output and finish reason that a choice must have; None if it fails because of NaN."""
    ids = list(submit.prompt_ids)
    sampling = submit.sampling
    output: list[int] = []
    while len(output) < submit.max_tokens and len(ids) < context:
        if ids[-1] == NAN_ID:
            return output, None
        seed = sampling.seed if sampling.temperature else 0
        ids.append(next_id(ids, seed, choice, len(output)))
        output.append(ids[-1])
        if ids[-1] in submit.end_ids:
            return output, "stop"
    return output, "length"


def healthy_prompt(length: int, start: int = 0, *, steps: int = 10) -> list[int]:
    """A prompt whose greedy output does not reach NaN."""
    for start in range(start, start + 1000):
        prompt = [(start * 7 + i) % NAN_ID for i in range(length)]
        if alone(Submit(0, prompt, steps, [], GREEDY), context=2000)[1]:
            return prompt
    raise AssertionError("no such prompt")
