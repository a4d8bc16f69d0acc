"""How the rows of a step are shared: smooth streams, long and short prompts."""

import numpy as np
import pytest

from llmsrv.backend.base import Batch
from tests.support.cores import Engine
from tests.support.cores import healthy_prompt
from tests.support.parameters import slow_but
from tests.support.timed_engine import Clock
from tests.support.timed_engine import gaps_of
from tests.support.timed_engine import timed_engine


@pytest.mark.parametrize("row_s", slow_but([0.0001, 0.0004, 0.002], 0.0004))
def test_a_stream_stays_smooth_while_long_prompts_arrive(row_s: float) -> None:
    clock = Clock(row_s=row_s)
    engine = timed_engine(clock)
    engine.submit(0, healthy_prompt(20, steps=1200), max_tokens=1200)
    for _ in range(100):
        engine.step()
    for request in range(1, 3):  # each one after the previous one has finished
        engine.submit(request, healthy_prompt(1000, request, steps=1), max_tokens=1)
        gaps = gaps_of(engine, clock, 0, end=request)
        alone_s = clock.step_s + row_s
        least_rows_s = clock.step_s + row_s * 3  # MIN_PREFILL_ROWS_WITH_DECODE, if they take longer
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
    with_prompts: list[float] = []
    for request in range(8, 11):
        engine.submit(request, healthy_prompt(1000, request, steps=1), max_tokens=1)
        with_prompts += gaps_of(engine, clock, 0, end=request)
        engine.submit(100 + request, healthy_prompt(20, request), max_tokens=10)
        alone += gaps_of(engine, clock, 0, end=100 + request)[-9:]
    assert np.percentile(with_prompts, 99) <= 2 * np.median(alone)
    assert np.median(with_prompts) >= 1.15 * np.median(alone)  # the share of prompts


def rows_and_durations_next_to_a_stream(
    clock: Clock, num_tokens: int
) -> tuple[list[int], list[float]]:
    """Prompt rows and duration of each step that computes a prompt of num_tokens tokens."""
    engine = timed_engine(clock, context=5000)
    engine.submit(0, healthy_prompt(20, steps=3000), max_tokens=3000)
    while len(engine.outputs.get((0, 0), [])) < 20:
        engine.step()
    engine.submit(1, healthy_prompt(num_tokens, 1, steps=1), max_tokens=1)
    rows: list[int] = []
    times: list[float] = []
    forward = engine.plan.forward

    def recording(batch: Batch) -> None:
        start_s = clock.now_s
        forward(batch)
        rows.append(len(batch.ids) - 1)
        times.append(clock.now_s - start_s)

    engine.plan.forward = recording  # type: ignore[method-assign]
    while (1, 0) not in engine.outputs:
        engine.step()
    return rows, times


def test_a_prompt_gets_more_rows_further_on_while_steps_stay_smooth() -> None:
    clock = Clock(position_s=4e-7)
    rows, times = rows_and_durations_next_to_a_stream(clock, 4000)
    assert min(rows[-100:-1]) >= 6
    assert max(times) <= 0.04


def test_a_prompt_gets_no_more_rows_further_on_if_rows_are_expensive() -> None:
    clock = Clock(step_s=0.2, row_s=0.2)
    _, times = rows_and_durations_next_to_a_stream(clock, 4000)
    assert max(times) <= 3.1 * (clock.step_s + clock.row_s)


def test_short_prompts_progress_faster_than_long_ones_next_to_streams() -> None:
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
def test_a_question_does_not_wait_for_documents_that_arrived_before_it(
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


def test_a_document_keeps_at_least_half_its_speed_while_questions_arrive() -> None:
    num_steps = []
    for num_questions in (0, 40):
        engine = timed_engine(Clock(), max_rows=64)
        engine.submit(0, healthy_prompt(1900, steps=1), max_tokens=1)
        engine.step()
        for request in range(1, 1 + num_questions):
            engine.submit(request, healthy_prompt(100, request, steps=1), max_tokens=1)
        num_steps.append(steps_until_first_token(engine, 0))
    assert num_steps[0] < num_steps[1] <= 2 * num_steps[0] + 1


def test_a_question_does_not_overtake_a_waiting_document_of_higher_priority() -> None:
    engine = timed_engine(Clock(), max_rows=64)
    for request, priority in ((0, 1), (1, 0)):
        engine.submit(request, healthy_prompt(1200, request, steps=1), priority=priority)
        engine.step()
    engine.submit(2, healthy_prompt(30, 2, steps=1), max_tokens=1, priority=1)
    steps_until_first_token(engine, 2)
    assert (1, 0) in engine.outputs


@pytest.mark.parametrize("length, priority", [(1000, 0), (30, 1)], ids=["as long", "less urgent"])
def test_a_prompt_does_not_overtake_one_that_is_as_short_or_more_urgent(
    length: int, priority: int
) -> None:
    engine = timed_engine(Clock(), max_rows=64)
    engine.submit(0, healthy_prompt(1200, steps=1), max_tokens=1)
    engine.step()
    engine.submit(1, healthy_prompt(length, 1, steps=1), max_tokens=1, priority=priority)
    steps_until_first_token(engine, 1)
    assert (0, 0) in engine.finished


def test_a_long_prompt_that_is_cached_except_for_its_end_counts_as_short() -> None:
    engine = timed_engine(Clock(), max_rows=64)
    conversation = healthy_prompt(1000, 1, steps=2)
    engine.submit(0, conversation, max_tokens=1)
    engine.run()
    engine.submit(1, healthy_prompt(1200, 2, steps=1), max_tokens=1)
    engine.step()
    engine.submit(2, [*conversation, *engine.outputs[0, 0], 5, 6, 7], max_tokens=1)
    assert steps_until_first_token(engine, 2) <= 2


def test_many_streams_that_start_together_get_each_token_within_60_ms() -> None:
    clock = Clock(step_s=0.005, row_s=0.0005)  # 2000 rows per second; a step of 32 rows takes 21 ms
    engine = timed_engine(clock)
    for request in range(32):
        engine.submit(request, healthy_prompt(131, request, steps=64), max_tokens=64)
    assert np.percentile(gaps_of(engine, clock, 0, end=0), 99) <= 0.06
    assert clock.now_s - 1000 < 1.5 * (32 * (131 + 64) * clock.row_s + 64 * clock.step_s)


def test_a_prompt_gets_whole_steps_if_there_are_no_streams() -> None:
    clock = Clock(step_s=0.1)
    engine = timed_engine(clock)
    for request in range(3):
        engine.submit(request, healthy_prompt(1024, request, steps=1), max_tokens=1)
        engine.run()
    assert engine.plan.num_forwards == 6  # type: ignore[attr-defined]


def test_no_step_but_the_first_takes_over_a_second_if_rows_are_expensive() -> None:
    clock = Clock(step_s=0.2, row_s=0.02)
    engine = timed_engine(clock)
    engine.submit(0, healthy_prompt(1024, steps=1), max_tokens=1)
    ends = [clock.now_s]
    while engine.core.has_work:
        engine.step()
        ends.append(clock.now_s)
    steps_s = np.diff(ends)[1:]
    assert np.median(steps_s) > 0.8 and steps_s.max() <= 1.0


def test_a_slow_model_gives_prompts_a_smaller_share_of_a_step_but_never_none() -> None:
    clock = Clock(step_s=0.2, row_s=0.02)
    engine = timed_engine(clock)
    engine.submit(0, healthy_prompt(20, steps=300), max_tokens=300)
    for _ in range(5):
        engine.step()
    engine.submit(1, healthy_prompt(500, 1, steps=1), max_tokens=1)
    assert max(gaps_of(engine, clock, 0, end=1)) <= 1.5 * (0.2 + 0.02) + 1e-9
    assert (1, 0) in engine.finished
