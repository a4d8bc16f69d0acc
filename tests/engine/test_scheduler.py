"""When requests get their turn: smooth streams, fair shares, priorities, deadlines.

Time is a fake plan's own: a step takes what its rows are said to cost.
"""

import math
import random

import numpy as np
import pytest

from llmsrv.backend.base import Batch
from llmsrv.backend.base import Limits
from llmsrv.engine.messages import Sampling
from llmsrv.engine.step_costs import StepCosts
from tests.support.cores import Engine
from tests.support.cores import GREEDY
from tests.support.cores import healthy_prompt
from tests.support.fake_plan import FakePlan
from tests.support.parameters import slow_but

SEEDED = Sampling(seed=7)


class Clock:
    """The time, and what a step adds to it: so much, so much a row, so much for each position that
    a row looks back at, and by chance some more."""

    def __init__(
        self,
        step_s: float = 0.004,
        row_s: float = 0.0004,
        position_s: float = 0.0,
        noise: float = 0.0,
    ) -> None:
        self.now_s = 1000.0
        self.step_s = step_s
        self.row_s = row_s
        self.position_s = position_s
        self.noise = noise
        self._rng = random.Random(1)

    def __call__(self) -> float:
        return self.now_s

    def make_plan(self, limits: Limits) -> FakePlan:
        plan = FakePlan(limits)
        forward = plan.forward

        def timed(batch: Batch) -> None:
            forward(batch)
            looking_s = self.position_s * float(batch.positions.sum())
            elapsed_s = self.step_s + self.row_s * len(batch.ids) + looking_s
            self.now_s += elapsed_s * (1 + self.noise * abs(self._rng.gauss(0, 1)))

        plan.forward = timed  # type: ignore[method-assign]
        return plan


def timed_engine(clock: Clock, **limits: int) -> Engine:
    sizes = {"max_rows": 512, "max_sequences": 32, "blocks": 1000, "context": 2000, **limits}
    return Engine(make_plan=clock.make_plan, clock=clock, **sizes)  # type: ignore[arg-type]


def gaps_of(engine: Engine, clock: Clock, request: int, end: int) -> list[float]:
    """Seconds between the tokens of one request until another, or it, has finished."""
    times = []
    while (end, 0) not in engine.finished:
        if any(tokens.request == request for tokens in engine.step().tokens):
            times.append(clock.now_s)
    return np.diff(times).tolist()


@pytest.mark.parametrize("row_s", slow_but([0.0001, 0.0004, 0.002], 0.0004))
def test_a_stream_stays_smooth_while_long_prompts_arrive(row_s: float) -> None:
    clock = Clock(row_s=row_s)
    engine = timed_engine(clock)
    engine.submit(0, healthy_prompt(20, steps=1200), max_tokens=1200)
    for _ in range(100):
        engine.step()
    for request in range(1, 3):  # one as soon as the one before it is finished
        engine.submit(request, healthy_prompt(1000, request, steps=1), max_tokens=1)
        gaps = gaps_of(engine, clock, 0, end=request)
        alone_s = clock.step_s + row_s
        least_rows_s = clock.step_s + row_s * 3  # or so many, where that takes longer
        assert np.percentile(gaps, 99) <= max(3 * alone_s, least_rows_s) + 1e-9


@pytest.mark.parametrize(
    "num_streams, position_s",
    [
        (1, 0.7e-6),
        pytest.param(8, 0.0, marks=pytest.mark.slow),
        pytest.param(8, 1.4e-6, marks=pytest.mark.slow),
    ],
)
def test_streams_stay_smooth_to_the_end_of_long_prompts(
    num_streams: int, position_s: float
) -> None:
    clock = Clock(step_s=0.005, row_s=0.0005, position_s=position_s, noise=0.1)
    engine = timed_engine(clock, max_rows=256)
    for request in range(num_streams):
        engine.submit(request, healthy_prompt(131, request, steps=450), max_tokens=450)
    while len(engine.outputs) < num_streams:
        engine.step()
    alone: list[float] = []
    beside: list[float] = []
    for request in range(8, 11):
        engine.submit(request, healthy_prompt(1000, request, steps=1), max_tokens=1)
        beside += gaps_of(engine, clock, 0, end=request)
        engine.submit(100 + request, healthy_prompt(20, request), max_tokens=10)
        alone += gaps_of(engine, clock, 0, end=100 + request)[-9:]
    assert np.percentile(beside, 99) <= 2 * np.median(alone)
    assert np.median(beside) >= 1.15 * np.median(alone)  # what prompts get


def rows_and_times_beside_a_stream(
    clock: Clock, num_tokens: int
) -> tuple[list[int], list[float]]:
    """Of each step that computes a prompt of so many tokens: its rows of it, and its seconds."""
    engine = timed_engine(clock, context=5000)
    engine.submit(0, healthy_prompt(20, steps=3000), max_tokens=3000)
    while len(engine.outputs.get((0, 0), [])) < 20:
        engine.step()
    engine.submit(1, healthy_prompt(num_tokens, 1, steps=1), max_tokens=1)
    rows: list[int] = []
    times: list[float] = []
    forward = engine.plan.forward

    def noting(batch: Batch) -> None:
        begun_s = clock.now_s
        forward(batch)
        rows.append(len(batch.ids) - 1)
        times.append(clock.now_s - begun_s)

    engine.plan.forward = noting  # type: ignore[method-assign]
    while (1, 0) not in engine.outputs:
        engine.step()
    return rows, times


def test_a_prompt_gets_more_rows_as_it_goes_on_while_steps_stay_smooth() -> None:
    clock = Clock(position_s=4e-7)
    rows, times = rows_and_times_beside_a_stream(clock, 4000)
    assert min(rows[-100:-1]) >= 6
    assert max(times) <= 0.04


def test_where_rows_are_dear_a_prompt_gets_no_more_of_them_as_it_goes_on() -> None:
    clock = Clock(step_s=0.2, row_s=0.2)
    _, times = rows_and_times_beside_a_stream(clock, 4000)
    assert max(times) <= 3.1 * (clock.step_s + clock.row_s)


def test_short_prompts_get_on_faster_beside_streams_than_long_ones() -> None:
    steps: dict[int, float] = {}
    for num_tokens in (500, 1000):
        clock = Clock(step_s=0.005, row_s=0.0005)
        engine = timed_engine(clock)
        for request in range(8):
            engine.submit(request, healthy_prompt(20, request, steps=400), max_tokens=400)
        while len(engine.outputs) < 8:
            engine.step()
        engine.submit(8, healthy_prompt(num_tokens, 8, steps=1), max_tokens=1)
        steps[num_tokens] = len(gaps_of(engine, clock, 0, end=8)) / num_tokens
    assert steps[500] < 0.7 * steps[1000]


def steps_until_first_token(engine: Engine, request: int) -> int:
    count = 0
    while (request, 0) not in engine.outputs:
        engine.step()
        count += 1
    return count


@pytest.mark.parametrize("num_streams", [0, 1])
@pytest.mark.parametrize("num_documents", [1, 3])
def test_a_question_does_not_wait_until_documents_that_came_before_it_are_read(
    num_streams: int, num_documents: int
) -> None:
    engine = timed_engine(Clock(step_s=0.005, row_s=0.0005), max_rows=64)
    for request in range(num_streams):
        engine.submit(request, healthy_prompt(20, request, steps=900), max_tokens=900)
        engine.step()
    documents = range(10, 10 + num_documents)
    for request in documents:
        engine.submit(request, healthy_prompt(1900, request, steps=1), max_tokens=1)
        engine.step()
    engine.submit(20, healthy_prompt(30, 20, steps=1), max_tokens=1)
    assert steps_until_first_token(engine, 20) <= (30 if num_streams else 2)
    assert not any((request, 0) in engine.outputs for request in documents)
    for request in documents:
        steps_until_first_token(engine, request)


def test_a_document_is_read_at_half_its_speed_at_least_while_questions_come() -> None:
    num_steps = []
    for num_questions in (0, 40):
        engine = timed_engine(Clock(), max_rows=64)
        engine.submit(0, healthy_prompt(1900, steps=1), max_tokens=1)
        engine.step()
        for request in range(1, 1 + num_questions):
            engine.submit(request, healthy_prompt(100, request, steps=1), max_tokens=1)
        num_steps.append(steps_until_first_token(engine, 0))
    assert num_steps[0] < num_steps[1] <= 2 * num_steps[0] + 1


def test_a_question_does_not_overtake_a_more_urgent_document_that_waits() -> None:
    engine = timed_engine(Clock(), max_rows=64)
    for request, priority in ((0, 1), (1, 0)):
        engine.submit(request, healthy_prompt(1200, request, steps=1), priority=priority)
        engine.step()
    engine.submit(2, healthy_prompt(30, 2, steps=1), max_tokens=1, priority=1)
    steps_until_first_token(engine, 2)
    assert (1, 0) in engine.outputs


@pytest.mark.parametrize("length, priority", [(1000, 0), (30, 1)], ids=["as long", "less urgent"])
def test_a_prompt_waits_for_one_before_it_that_is_no_longer_or_more_urgent(
    length: int, priority: int
) -> None:
    engine = timed_engine(Clock(), max_rows=64)
    engine.submit(0, healthy_prompt(1200, steps=1), max_tokens=1)
    engine.step()
    engine.submit(1, healthy_prompt(length, 1, steps=1), max_tokens=1, priority=priority)
    steps_until_first_token(engine, 1)
    assert (0, 0) in engine.finished


def test_a_long_prompt_that_is_known_but_for_its_end_is_a_short_one() -> None:
    engine = timed_engine(Clock(), max_rows=64)
    conversation = healthy_prompt(1000, 1, steps=2)
    engine.submit(0, conversation, max_tokens=1)
    engine.run()
    engine.submit(1, healthy_prompt(1200, 2, steps=1), max_tokens=1)
    engine.step()
    engine.submit(2, [*conversation, *engine.outputs[0, 0], 5, 6, 7], max_tokens=1)
    assert steps_until_first_token(engine, 2) <= 2


def test_many_streams_that_begin_at_once_wait_at_most_sixty_milliseconds_a_token() -> None:
    clock = Clock(step_s=0.005, row_s=0.0005)  # 2000 rows a second, a step of 32 takes 21 ms
    engine = timed_engine(clock)
    for request in range(32):
        engine.submit(request, healthy_prompt(131, request, steps=64), max_tokens=64)
    assert np.percentile(gaps_of(engine, clock, 0, end=0), 99) <= 0.06
    assert clock.now_s - 1000 < 1.5 * (32 * (131 + 64) * clock.row_s + 64 * clock.step_s)


def test_a_prompt_takes_whole_steps_while_nothing_streams() -> None:
    clock = Clock(step_s=0.1)
    engine = timed_engine(clock)
    for request in range(3):
        engine.submit(request, healthy_prompt(1024, request, steps=1), max_tokens=1)
        engine.run()
    assert engine.plan.num_forwards == 6  # type: ignore[attr-defined]


def test_where_rows_are_dear_no_step_takes_longer_than_a_second_but_the_first() -> None:
    clock = Clock(step_s=0.2, row_s=0.02)
    engine = timed_engine(clock)
    engine.submit(0, healthy_prompt(1024, steps=1), max_tokens=1)
    ends = [clock.now_s]
    while engine.core.has_work:
        engine.step()
        ends.append(clock.now_s)
    steps_s = np.diff(ends)[1:]
    assert np.median(steps_s) > 0.8 and steps_s.max() <= 1.0


def test_a_slow_model_gives_prompts_less_of_a_step_but_never_nothing() -> None:
    clock = Clock(step_s=0.2, row_s=0.02)
    engine = timed_engine(clock)
    engine.submit(0, healthy_prompt(20, steps=300), max_tokens=300)
    for _ in range(5):
        engine.step()
    engine.submit(1, healthy_prompt(500, 1, steps=1), max_tokens=1)
    assert max(gaps_of(engine, clock, 0, end=1)) <= 1.5 * (0.2 + 0.02) + 1e-9
    assert (1, 0) in engine.finished


def test_unknown_costs_lie_between_those_of_fewer_and_of_more_rows() -> None:
    costs = StepCosts()
    assert costs.of(1) == 0 and costs.rows_within(1.0) == math.inf
    costs.record(1, 0.005)
    costs.record(64, 0.05)
    assert costs.of(1) == 0.005 and costs.of(8) == pytest.approx(0.01)
    assert costs.of(64) == 0.05 and costs.of(128) == 0.1
    assert costs.rows_within(0.01) == 2  # and then, when they were measured, more
    costs.record(8, 0.012)
    for limit_s in (0.005, 0.012, 0.015, 0.05, 0.2):
        assert costs.of(round(costs.rows_within(limit_s))) == pytest.approx(limit_s, rel=0.1)


def test_steps_of_fewer_rows_than_any_cost_what_those_of_more_let_expect() -> None:
    costs = StepCosts()
    costs.record(128, 0.07)
    assert costs.of(1) == pytest.approx(0.07 / 128)  # at least
    costs.record(8, 0.01)
    assert costs.of(1) == pytest.approx(0.01 - 7 * 0.0005)


def test_one_slow_step_changes_little_and_is_soon_forgotten() -> None:
    costs = StepCosts()
    costs.record(16, 0.01)
    costs.record(16, 3.0)
    assert costs.of(16) <= 0.0125
    costs = StepCosts()
    costs.record(16, 3.0)
    for _ in range(25):
        costs.record(16, 0.01)
    assert costs.of(16) < 0.015


def test_what_a_step_took_bounds_what_others_take() -> None:
    costs = StepCosts()
    for rows, cost_s in ((1, 0.1), (8, 0.1), (64, 0.1)):
        costs.record(rows, cost_s)
    for _ in range(100):
        costs.record(8, 0.01)
    assert [costs.of(rows) for rows in (1, 8, 64)] == pytest.approx([0.01, 0.01, 0.08])
    for _ in range(100):
        costs.record(64, 0.4)
    assert [costs.of(rows) for rows in (1, 8, 64)] == pytest.approx([0.01, 0.05, 0.4])


def order_of(engine: Engine) -> list[int]:
    engine.run()
    engine.assert_idle()
    return engine.admitted


def test_lower_priorities_go_first_and_equal_ones_in_the_order_of_arrival() -> None:
    engine = Engine(max_sequences=1)
    for request, priority in enumerate([5, 0, 0, -1, 5, 0, -7]):
        engine.submit(request, healthy_prompt(4, request), priority=priority)
    assert order_of(engine) == [6, 3, 1, 2, 5, 0, 4]


def test_a_request_of_low_priority_gets_its_turn_in_an_endless_row_of_urgent_ones() -> None:
    engine = Engine(max_sequences=1, blocks=1000, context=2000, max_rows=512)
    engine.submit(0, healthy_prompt(4, steps=2), priority=1, max_tokens=2)
    for request in range(1, 400):
        engine.submit(request, [request % 40] * 1000, max_tokens=1)
        while request not in engine.admitted and not {0} & set(engine.admitted):
            engine.step()
        if 0 in engine.admitted:
            return
    raise AssertionError("it starves")


def test_tenants_take_turns_however_many_requests_each_of_them_has() -> None:
    engine = Engine(max_sequences=1)
    for request in range(6):
        engine.submit(request, healthy_prompt(4, request), tenant=b"many")
    for request in (10, 11):
        engine.submit(request, healthy_prompt(4, request), tenant=b"few")
    assert order_of(engine) == [0, 10, 1, 11, 2, 3, 4, 5]


def test_tenants_share_tokens_and_not_requests() -> None:
    engine = Engine(max_sequences=1, blocks=100, context=500, max_rows=512)
    for request in range(3):
        engine.submit(request, healthy_prompt(395, request, steps=5), max_tokens=5, tenant=b"long")
    for request in range(10, 20):
        engine.submit(request, healthy_prompt(95, request, steps=5), max_tokens=5, tenant=b"short")
    admitted = order_of(engine)
    assert admitted[:6] == [0, 10, 11, 12, 13, 1]  # 400 tokens to each of them


def test_a_tenant_gets_no_credit_for_having_been_away() -> None:
    engine = Engine(max_sequences=1)
    for request in range(20):
        engine.submit(request, healthy_prompt(4, request), tenant=b"busy")
        engine.run()
    for request in range(20, 24):
        engine.submit(request, healthy_prompt(4, request), tenant=b"busy")
    for request in range(30, 34):
        engine.submit(request, healthy_prompt(4, request), tenant=b"new")
    assert order_of(engine)[20:] == [30, 20, 31, 21, 32, 22, 33, 23]


def test_urgent_requests_keep_their_place_in_memory_and_the_others_give_way() -> None:
    engine = Engine(max_sequences=3, blocks=6, context=64)
    for request, priority in enumerate([1, 1, 0]):
        prompt = healthy_prompt(14, 50 * request, steps=45)
        engine.submit(request, prompt, max_tokens=45, priority=priority)
    ended = []
    while engine.core.has_work:
        ended += [finished.request for finished in engine.step().finished]
    assert ended == [2, 0, 1] and engine.gauges.num_preemptions >= 1
    engine.assert_idle()


@pytest.mark.parametrize("num_steps", [0, 2, 40])
def test_what_is_not_finished_by_its_deadline_fails_and_frees_everything(num_steps: int) -> None:
    clock = Clock()
    engine = timed_engine(clock, max_sequences=1, max_rows=16)
    deadline_s = clock.now_s + 10
    healthy = engine.submit(1, healthy_prompt(30, steps=60), max_tokens=60)
    late = healthy_prompt(100, 3, steps=1000)
    engine.submit(2, late, max_tokens=1000, n=2, deadline_s=deadline_s, priority=-1)
    engine.submit(3, healthy_prompt(5, 8), deadline_s=deadline_s + 1000)
    for _ in range(num_steps):
        engine.step()
    clock.now_s = deadline_s - 0.001
    engine.step()
    assert not engine.failed
    clock.now_s = deadline_s
    engine.step()
    assert engine.failed[2].status == 504 and engine.failed[2].code == "request_timeout"
    engine.run()
    assert engine.finished[3, 0].reason == engine.finished[healthy.request, 0].reason == "length"
    engine.assert_idle()


def test_a_deadline_of_a_request_that_has_ended_does_nothing() -> None:
    clock = Clock()
    engine = timed_engine(clock)
    engine.submit(1, healthy_prompt(5), deadline_s=clock.now_s + 100, sampling=GREEDY)
    engine.run()
    clock.now_s += 200
    engine.submit(2, healthy_prompt(6), sampling=SEEDED)
    engine.run()
    assert not engine.failed and (1, 0) in engine.finished
