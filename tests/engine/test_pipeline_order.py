"""Running ahead: when steps are enqueued and read on an asynchronous plan."""

from collections.abc import Callable
from collections.abc import Iterable
from concurrent.futures import Future

import numpy as np
import pytest

from llmsrv.backend.base import Batch
from llmsrv.backend.base import Limits
from llmsrv.backend.base import PendingSamples
from llmsrv.backend.sampling.samples import Samples
from llmsrv.backend.sampling.table import Mask
from llmsrv.engine.messages import Submit
from tests.support.async_plan import AsyncFakePlan
from tests.support.cores import alone
from tests.support.cores import Engine
from tests.support.cores import GREEDY
from tests.support.cores import healthy_prompt
from tests.support.fake_plan import NAN_ID


def async_engine(**options: object) -> tuple[Engine, AsyncFakePlan]:
    engine = Engine(make_plan=AsyncFakePlan, **options)  # type: ignore[arg-type]
    assert isinstance(engine.plan, AsyncFakePlan)
    return engine, engine.plan


def test_every_step_is_enqueued_before_the_one_before_it_is_read() -> None:
    engine, plan = async_engine()
    submit = engine.submit(1, healthy_prompt(5), max_tokens=10)
    engine.run()
    assert plan.events == ["enqueue", *["enqueue ahead", "read"] * 9, "read"]
    assert engine.outputs[1, 0] == alone(submit)[0]
    engine.assert_idle()


def test_a_step_returns_without_reading_what_it_has_just_enqueued() -> None:
    engine, plan = async_engine()
    engine.submit(1, healthy_prompt(5), max_tokens=1)
    assert not engine.step().tokens and plan.events == ["enqueue"]
    assert engine.core.has_work
    assert len(engine.step().tokens) == 1 and plan.events == ["enqueue", "read"]
    assert not engine.core.has_work


def test_steps_without_logit_rows_are_read_too_so_that_only_two_are_in_flight() -> None:
    engine, plan = async_engine(max_rows=8)
    submit = engine.submit(1, healthy_prompt(50), max_tokens=2)
    engine.run()
    assert plan.events == ["enqueue", *["enqueue", "read"] * 6, "enqueue ahead", "read", "read"]
    assert engine.outputs[1, 0] == alone(submit)[0]


def test_a_sequence_that_ends_by_an_end_id_wastes_one_row() -> None:
    prompt = healthy_prompt(5)
    output = alone(Submit(1, prompt, 10, [], GREEDY))[0]
    engine, plan = async_engine()
    engine.submit(1, prompt, end_ids=[output[4]])
    engine.run()
    length = output.index(output[4]) + 1
    assert engine.outputs[1, 0] == output[:length]
    assert plan.events == ["enqueue", *["enqueue ahead", "read"] * length, "read"]
    engine.assert_idle()


def test_a_failed_row_fails_its_request_and_its_next_row_is_dropped() -> None:
    engine, plan = async_engine()
    healthy = engine.submit(1, healthy_prompt(5))
    engine.submit(2, [4, NAN_ID], n=2)
    engine.run()
    assert engine.failed[2].status == 500 and (2, 0) not in engine.outputs
    assert engine.outputs[1, 0] == alone(healthy)[0]
    assert plan.num_ahead >= 9
    engine.assert_idle()


class AnyText:
    """A grammar that allows everything."""

    def masks(self, drafts: Iterable[int] = ()) -> Mask:
        return np.full((1, 2), 2**32 - 1, np.uint32)

    def accept(self, id: int) -> bool:
        return False

    def forced(self) -> list[int]:
        return []

    def copy(self) -> "AnyText":
        return self


def test_no_step_is_enqueued_ahead_of_a_token_that_a_grammar_must_see() -> None:
    engine, plan = async_engine()
    grammar: Future[AnyText] = Future()
    grammar.set_result(AnyText())
    engine.core._compile_grammar = lambda source: grammar  # type: ignore
    submit = engine.submit(1, healthy_prompt(5), max_tokens=6, grammar="any")
    longer = engine.submit(2, healthy_prompt(5, 1), max_tokens=20)
    while (1, 0) not in engine.finished:
        assert plan.num_ahead == 0
        engine.step()
    engine.run()
    assert plan.num_ahead == 20 - 7  # the step after the grammar's last token waits too
    for each in (submit, longer):
        assert engine.outputs[each.request, 0] == alone(each)[0]


def test_no_step_is_enqueued_ahead_of_prompt_log_probabilities_or_drafts() -> None:
    engine, plan = async_engine(spare_logit_rows=4)
    engine.submit(1, healthy_prompt(20), prompt_logprobs=True, max_tokens=1)
    engine.run()
    assert plan.events == ["enqueue", "read"] * 4  # 5 logit rows at a time
    engine, plan = async_engine(spare_logit_rows=4, draft_length=2)
    engine.submit(1, healthy_prompt(20))
    engine.run()
    assert plan.num_ahead == 0 and plan.events[:4] == ["enqueue", "read"] * 2


def test_no_step_is_enqueued_ahead_when_scheduling_might_preempt() -> None:
    engine, plan = async_engine(max_sequences=2, blocks=4, context=64)
    submits = [
        engine.submit(r, healthy_prompt(14, 50 * r, steps=45), max_tokens=45) for r in range(2)
    ]
    while engine.core.has_work:
        num_ahead, before = plan.num_ahead, engine.gauges.num_preemptions
        engine.step()
        assert plan.num_ahead == num_ahead or engine.gauges.num_preemptions == before
    assert engine.gauges.num_preemptions > 0 and plan.num_ahead > 30
    for submit in submits:
        assert engine.outputs[submit.request, 0] == alone(submit)[0]
    engine.assert_idle()


def test_a_block_is_cached_only_when_its_last_token_is_known() -> None:
    engine, plan = async_engine()
    prompt = healthy_prompt(20, steps=40)
    engine.submit(1, prompt, max_tokens=40)
    engine.run()
    engine.submit(2, [*prompt, *engine.outputs[1, 0], 5], max_tokens=1)
    engine.run()
    assert engine.num_cached == [0, 59]
    cached = engine.core._kv_cache._hash_of.values()
    assert min(min(memoryview(each.tokens).cast("i")) for each in cached) >= 0


def test_a_block_is_cached_as_soon_as_its_last_token_is_known() -> None:
    engine, _ = async_engine(max_rows=64)
    prompt = healthy_prompt(20, steps=60)
    engine.submit(1, prompt, max_tokens=60)
    while len(engine.outputs.get((1, 0), [])) < 28:  # 3 blocks are full
        engine.step()
    engine.submit(2, [*prompt, *engine.outputs[1, 0], 5], max_tokens=1)
    engine.run()
    assert engine.num_cached == [0, 48]


@pytest.mark.parametrize("num_steps", range(1, 8))
def test_a_sequence_preempted_between_two_steps_samples_its_pending_token_again(
    num_steps: int,
) -> None:
    engine, _ = async_engine()
    submit = engine.submit(1, healthy_prompt(5), max_tokens=10)
    for _ in range(num_steps):
        engine.step()
    engine.core._scheduler._preempt_last()
    engine.run()
    assert engine.outputs[1, 0] == alone(submit)[0]
    engine.assert_idle()


@pytest.mark.parametrize("num_steps", range(8))
def test_a_deadline_between_two_steps_fails_the_request(num_steps: int) -> None:
    now_s = 0.0
    engine, plan = async_engine(max_sequences=2, clock=lambda: now_s)
    healthy = engine.submit(1, healthy_prompt(5), max_tokens=10)
    engine.submit(2, healthy_prompt(6, steps=50), max_tokens=50, deadline_s=5.0)
    for _ in range(num_steps):
        engine.step()
    now_s = 5.0
    engine.step()
    assert engine.failed[2].status == 504
    engine.run()
    assert engine.outputs[1, 0] == alone(healthy)[0]
    engine.assert_idle()


class Device:
    """Time of a host with a device that takes step_s for each step."""

    def __init__(self, step_s: float) -> None:
        self.now_s = 100.0
        self._step_s = step_s
        self._free_s = 0.0  # when the device has finished everything enqueued

    def make_plan(self, limits: Limits) -> AsyncFakePlan:
        plan = AsyncFakePlan(limits)
        forward, enqueue_sample = plan.forward, plan.enqueue_sample

        def timed_forward(batch: Batch) -> None:
            forward(batch)
            self._free_s = max(self._free_s, self.now_s) + self._step_s

        def timed_sample(*rows: object) -> PendingSamples:
            read, done_s = enqueue_sample(*rows).read, self._free_s  # type: ignore[arg-type]
            return PendingSamples(lambda: self._wait_and_read(done_s, read))

        plan.forward, plan.enqueue_sample = timed_forward, timed_sample  # type: ignore
        return plan

    def _wait_and_read(self, done_s: float, read: Callable[[], Samples]) -> Samples:
        self.now_s = max(self.now_s, done_s)
        return read()


def test_the_cost_of_a_step_is_the_time_of_the_device_and_the_host_costs_nothing() -> None:
    device = Device(step_s=0.010)
    engine = Engine(make_plan=device.make_plan, clock=lambda: device.now_s)
    engine.submit(1, healthy_prompt(5, steps=50), max_tokens=50)
    start_s = device.now_s
    while engine.core.has_work:
        engine.step()
        device.now_s += 0.004  # the host's work between two steps
    assert device.now_s - start_s == pytest.approx(50 * 0.010, abs=0.01)
    assert engine.core._costs.of(1) == pytest.approx(0.010)
