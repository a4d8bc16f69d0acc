"""The engine under random submits, steps, aborts, preemptions and crashes."""

import math
from collections import Counter
from contextlib import suppress

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle
from hypothesis.stateful import consumes
from hypothesis.stateful import invariant
from hypothesis.stateful import precondition
from hypothesis.stateful import rule
from hypothesis.stateful import RuleBasedStateMachine

from llmsrv.engine.messages import Abort
from llmsrv.engine.messages import Failed
from llmsrv.engine.messages import PROMPT
from llmsrv.engine.messages import Sampling
from llmsrv.engine.messages import Submit
from tests.support.async_plan import AsyncFakePlan
from tests.support.cores import alone
from tests.support.cores import Engine
from tests.support.cores import GREEDY
from tests.support.fake_plan import NAN_ID
from tests.support.fake_plan import VOCAB_SIZE


class Anything(RuleBasedStateMachine):
    """Submits, steps, aborts and more in any order, with a KV cache that is far too small."""

    requests: Bundle[Submit] = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.engine = self.new_engine()
        self.submits: dict[int, Submit] = {}
        self.aborted: set[int] = set()

    def new_engine(self) -> Engine:
        return Engine(
            max_sequences=5,
            blocks=6,
            max_rows=9,
            context=80,
            clock=lambda: self.now_s,
            spare_logit_rows=7,
            draft_length=3,
        )

    @rule(
        target=requests,
        prompt=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=20)
        | st.integers(0, 100).map(lambda length: list(range(length % NAN_ID)) * 2),
        max_tokens=st.integers(1, 70),
        end_ids=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=2),
        sampling=st.sampled_from([GREEDY, Sampling(seed=5), Sampling(seed=2**64 - 1)]),
        n=st.integers(1, 4),
        priority=st.integers(-1, 1),
        tenant=st.sampled_from([b"", b"a", b"b"]),
        timeout_s=st.sampled_from([math.inf, math.inf, 25.0]),
        prompt_logprobs=st.booleans(),
    )
    def submit(
        self,
        prompt: list[int],
        max_tokens: int,
        end_ids: list[int],
        sampling: Sampling,
        n: int,
        priority: int,
        tenant: bytes,
        timeout_s: float,
        prompt_logprobs: bool,
    ) -> Submit:
        submit = Submit(
            len(self.submits),
            prompt,
            max_tokens,
            end_ids,
            sampling,
            n,
            priority=priority,
            tenant=tenant,
            deadline_s=self.now_s + timeout_s,
            prompt_logprobs=prompt_logprobs,
        )
        self.submits[submit.request] = submit
        self.engine.core.submit(submit)
        return submit

    @rule(times=st.integers(1, 20))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.engine.step()

    @rule(submit=requests, choice=st.none() | st.integers(0, 3))
    def abort(self, submit: Submit, choice: int | None) -> None:
        self.aborted.add(submit.request)
        self.engine.core.abort(Abort(submit.request, choice))

    @rule(submit=consumes(requests))
    def abort_at_once(self, submit: Submit) -> None:
        self.abort(submit, None)
        assert submit.request not in self.engine.core._sequences

    @rule()
    def time_passes(self) -> None:
        self.now_s += 10

    @precondition(lambda self: self.engine.core._scheduler.running)
    @rule()
    def preempt(self) -> None:
        self.engine.core._scheduler._preempt_last()

    @precondition(lambda self: self.engine.core._scheduler.running)
    @rule()
    def crash(self) -> None:
        """The client fails all requests in the engine; a new engine knows nothing of them."""

        def broken(batch: object) -> None:
            raise FloatingPointError

        before, self.engine = self.engine, self.new_engine()
        before.plan.forward = broken  # type: ignore[method-assign]
        with suppress(FloatingPointError):
            before.core.step()  # its report is lost
        self.engine.outputs, self.engine.finished = before.outputs, before.finished
        self.engine.failed = before.failed
        for request, submit in self.submits.items():
            if not all((request, choice) in before.finished for choice in range(submit.n)):
                before.failed.setdefault(request, Failed(request, 500, "the engine crashed"))

    @precondition(lambda self: self.engine.core.has_work)
    @rule()
    def finish(self) -> None:
        self.engine.run()
        self.engine.assert_idle()
        self.check_ends()

    @invariant()
    def every_block_is_free_used_or_evictable(self) -> None:
        cache = self.engine.core._kv_cache
        holders = Counter(cache.block_tables[cache.block_tables > 0].tolist())
        assert cache.num_free + cache.num_used == cache.num_total
        blocks = [*holders, *cache._free, *cache._evictable]
        assert Counter(blocks) == Counter(range(1, cache.num_total + 1))
        assert all(cache._ref_counts[block] == holders[block] for block in blocks)
        assert cache._evictable.keys() <= cache._hash_of.keys()
        assert {each.key: block for block, each in cache._hash_of.items()} == cache._block_of

    @invariant()
    def slots_and_order_are_kept(self) -> None:
        scheduler = self.engine.core._scheduler
        slots = [sequence.slot for sequence in scheduler.running]
        assert sorted(slots + scheduler._free_slots) == list(range(5))
        for sequences in (scheduler.running, list(scheduler.waiting)):
            ranks = [sequence.rank for sequence in sequences]
            assert ranks == sorted(ranks)

    def check_ends(self) -> None:
        """Each choice has exactly one terminal event, and the same output as alone."""
        for request, submit in self.submits.items():
            self.check_prompt_logprobs(submit)
            for choice in range(submit.n):
                key = request, choice
                finished = self.engine.finished.get(key)
                assert finished or request in self.engine.failed
                output = self.engine.outputs.get(key, [])
                if not 0 < len(submit.prompt_ids) < 80:
                    assert request in self.engine.failed and not output
                    continue
                expected, reason = alone(submit, choice, context=80)
                assert output == expected[: len(output)]
                if finished and finished.reason != "abort":
                    assert (output, finished.reason) == (expected, reason)
                    assert finished.num_output_tokens == len(output)
                if finished and finished.reason == "abort":
                    assert request in self.aborted

    def check_prompt_logprobs(self, submit: Submit) -> None:
        """The prompt tokens sent are its first ones, and all of them come before any output."""
        sent = self.engine.outputs.get((submit.request, PROMPT), [])
        assert sent == submit.prompt_ids[1 : 1 + len(sent)]
        if submit.prompt_logprobs and (submit.request, 0) in self.engine.outputs:
            assert len(sent) == len(submit.prompt_ids) - 1

    def teardown(self) -> None:
        self.engine.run()
        self.engine.step()
        self.engine.assert_idle()
        self.check_ends()


class AnythingPipelined(Anything):
    """The same on an asynchronous plan.  Without drafts, so that the core runs ahead."""

    def new_engine(self) -> Engine:
        return Engine(
            max_sequences=5,
            blocks=6,
            max_rows=9,
            context=80,
            clock=lambda: self.now_s,
            spare_logit_rows=7,
            make_plan=AsyncFakePlan,
        )

    @invariant()
    def no_placeholder_is_left(self) -> None:
        for sequences in self.engine.core._sequences.values():
            assert not any(sequence.has_placeholder for sequence in sequences)


TestAnything = Anything.TestCase
TestAnythingPipelined = AnythingPipelined.TestCase
for case in (TestAnything, TestAnythingPipelined):
    case.settings = settings(max_examples=15, stateful_step_count=25)
