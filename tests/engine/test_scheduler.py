"""How the rows of a step are shared: smooth streams, long and short prompts."""

import numpy as np
import pytest

from llmsrv.backend.base import Batch
from tests.support.cores import Engine
from tests.support.cores import healthy_prompt
from tests.support.timed_engine import Clock
from tests.support.timed_engine import gaps_of
from tests.support.timed_engine import timed_engine


def start_streams(engine: Engine, num_streams: int) -> None:
    for request in range(num_streams):
        engine.submit(request, healthy_prompt(20, request, steps=900), max_tokens=900)
    while len(engine.outputs) < num_streams:
        engine.step()
    for _ in range(20):
        engine.step()


def duration_s(engine: Engine, clock: Clock, request: int, num_tokens: int) -> float:
    """How long a prompt takes until its first token, with no streams."""
    start_s = clock.now_s
    engine.submit(request, healthy_prompt(num_tokens, request, steps=1), max_tokens=1)
    engine.run()
    return clock.now_s - start_s


@pytest.mark.parametrize(
    "num_streams, row_s, position_s, noise",
    [
        (1, 0.0007, 2e-7, 0.05),
        (8, 0.0007, 2e-7, 0.05),
        pytest.param(1, 0.0001, 0.0, 0.0, marks=pytest.mark.slow),
        pytest.param(1, 0.002, 0.0, 0.0, marks=pytest.mark.slow),
        pytest.param(1, 0.0005, 7e-7, 0.05, marks=pytest.mark.slow),
        pytest.param(8, 0.0005, 1e-6, 0.05, marks=pytest.mark.slow),
    ],
)
def test_neither_a_long_prompt_nor_streams_have_to_wait_for_each_other(
    num_streams: int, row_s: float, position_s: float, noise: float
) -> None:
    clock = Clock(row_s=row_s, position_s=position_s, noise=noise)
    engine = timed_engine(clock, max_rows=256, context=4000)
    duration_s(engine, clock, 100, 3000)  # the first steps are cautious
    alone_s = duration_s(engine, clock, 101, 3000)
    start_streams(engine, num_streams)
    start_s = clock.now_s
    engine.submit(102, healthy_prompt(3000, 102, steps=1), max_tokens=1)
    gaps = gaps_of(engine, clock, 0, end=102)
    assert clock.now_s - start_s <= 1.6 * alone_s
    assert np.percentile(gaps, 99) <= 0.06 and max(gaps) <= 0.12


def test_the_length_of_steps_with_streams_and_prompts_follows_an_option() -> None:
    num_steps = []
    for max_step_s in (0.02, 0.1):
        clock = Clock()
        engine = timed_engine(clock, max_step_s=max_step_s)
        start_streams(engine, 1)
        engine.submit(1, healthy_prompt(1500, 1, steps=1), max_tokens=1)
        gaps = gaps_of(engine, clock, 0, end=1)
        assert 0.8 * max_step_s < np.percentile(gaps, 90) and max(gaps) <= 1.01 * max_step_s
        num_steps.append(len(gaps))
    assert num_steps[0] > 5 * num_steps[1]


def test_a_long_prompt_gets_no_more_of_a_step_than_a_short_one_leaves() -> None:
    """A row far into its prompt takes several times as long as a row at its beginning."""
    clock = Clock(position_s=4e-7)
    engine = timed_engine(clock, context=5000)
    start_streams(engine, 1)
    engine.submit(1, healthy_prompt(4500, 1, steps=1), max_tokens=1, priority=1)
    for _ in range(40):
        engine.step()
    gaps: list[float] = []
    for request in range(2, 10):  # each comes before the long one
        engine.submit(request, healthy_prompt(5, request, steps=1), max_tokens=1)
        gaps += gaps_of(engine, clock, 0, end=request)
    gaps += gaps_of(engine, clock, 0, end=1)
    assert max(gaps) <= 0.06


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


def test_a_prompt_keeps_enough_rows_further_on_while_steps_stay_short() -> None:
    clock = Clock(position_s=4e-7)
    rows, times = rows_and_durations_next_to_a_stream(clock, 4000)
    assert min(rows[-100:-1]) >= 6
    assert max(times) <= 0.055


def test_a_prompt_gets_no_more_rows_further_on_if_rows_are_expensive() -> None:
    clock = Clock(step_s=0.2, row_s=0.2)
    _, times = rows_and_durations_next_to_a_stream(clock, 1000)
    assert max(times) <= 3.1 * (clock.step_s + clock.row_s)


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
