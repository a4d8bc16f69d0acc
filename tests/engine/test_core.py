"""The engine without its process, over a plan that notices every wrong block and position."""

import numpy as np

from llmsrv.engine.messages import Sampling
from llmsrv.engine.messages import Submit
from llmsrv.engine.scheduler import MIN_PREFILL_ROWS_WITH_DECODE
from tests.support.cores import alone
from tests.support.cores import Engine
from tests.support.cores import GREEDY
from tests.support.cores import healthy_prompt


def test_a_request_yields_its_tokens_and_one_finish() -> None:
    engine = Engine()
    submit = engine.submit(1, healthy_prompt(5))
    engine.run()
    assert engine.admitted == [1]
    assert engine.outputs[1, 0] == alone(submit)[0]
    finished = engine.finished[1, 0]
    assert (finished.reason, finished.num_prompt_tokens, finished.num_output_tokens) == (
        "length",
        5,
        10,
    )
    times = [finished.queued_s, finished.scheduled_s, finished.first_token_s, finished.last_token_s]
    assert times == sorted(times) and times[0] > 0
    engine.assert_idle()


def test_an_end_id_ends_the_choice_and_is_reported() -> None:
    prompt = healthy_prompt(5)
    output = alone(Submit(1, prompt, 10, [], GREEDY))[0]
    end = output[4]
    engine = Engine()
    engine.submit(1, prompt, end_ids=[end])
    engine.run()
    assert engine.outputs[1, 0] == output[: output.index(end) + 1]
    assert engine.finished[1, 0].reason == "stop"
    engine.assert_idle()


def test_the_context_length_ends_a_choice_with_length() -> None:
    engine = Engine(context=32)
    engine.submit(1, healthy_prompt(30, steps=40), max_tokens=1000)
    engine.submit(2, healthy_prompt(31, steps=40), max_tokens=1000)
    engine.run()
    assert [engine.finished[r, 0].num_output_tokens for r in (1, 2)] == [2, 1]
    assert engine.finished[1, 0].reason == "length"
    engine.assert_idle()


def test_choices_are_drawn_by_their_index_and_position() -> None:
    engine = Engine(max_sequences=3)
    submit = engine.submit(1, [3, 1, 4], sampling=Sampling(seed=12345), n=5)
    engine.run()
    outputs = [engine.outputs[1, choice] for choice in range(5)]
    assert outputs == [alone(submit, choice)[0] for choice in range(5)]
    assert len(set(map(tuple, outputs))) == 5
    assert 1 in engine.admitted
    engine.assert_idle()


def test_log_probabilities_are_sent_only_if_requested() -> None:
    engine = Engine()
    prompt = healthy_prompt(3)
    for request, num_logprobs in enumerate((-1, 0, 3)):
        engine.submit(request, prompt, sampling=Sampling(0, 0.0, num_logprobs=num_logprobs))
    tokens = {t.request: t for t in engine.step().tokens}
    assert tokens[0].logprobs == [] and tokens[0].alternatives == []
    assert tokens[1].logprobs == [-0.5] and tokens[1].alternatives == [[]]
    assert tokens[2].alternatives == [[(0, -1.0), (1, -2.0), (2, -3.0)]]


def test_running_streams_continue_during_a_long_prefill() -> None:
    engine = Engine(max_rows=8, clock=lambda: 1.0)
    engine.submit(1, healthy_prompt(4, steps=30), max_tokens=30)
    engine.step()
    engine.submit(2, healthy_prompt(100))
    while 2 not in {request for request, _ in engine.outputs}:
        assert [t.request for t in engine.step().tokens][:1] == [1]
    assert len(engine.outputs[1, 0]) <= 1 + 100 // MIN_PREFILL_ROWS_WITH_DECODE


def test_prompts_are_computed_in_the_order_of_arrival() -> None:
    engine = Engine(max_rows=16, max_sequences=16)
    for request in range(6):
        engine.submit(request, healthy_prompt(20, request), max_tokens=1)
    engine.run()
    assert engine.admitted == list(range(6)) == [request for request, _ in engine.finished]


def test_no_sequence_starves_with_few_prefill_rows() -> None:
    engine = Engine(max_rows=4, max_sequences=4)
    for request in range(8):
        engine.submit(request, healthy_prompt(40, request, steps=40), max_tokens=40)
    engine.run(2000)
    assert len(engine.finished) == 8
    engine.assert_idle()


def test_the_arrays_of_a_step_keep_their_types_when_sequences_differ_in_length() -> None:
    """FakePlan checks the types; this checks that the tables fit the longest sequence."""
    engine = Engine(max_rows=64)
    widths = []
    forward = engine.plan.forward

    def recording(batch):  # type: ignore[no-untyped-def]
        widths.append(batch.block_tables.shape)
        assert np.array_equal(batch.block_tables[0, 1:], np.zeros(batch.block_tables.shape[1] - 1))
        forward(batch)

    engine.plan.forward = recording  # type: ignore[method-assign]
    engine.submit(1, healthy_prompt(3), max_tokens=2)
    engine.submit(2, healthy_prompt(50), max_tokens=2)
    engine.run()
    assert widths == [(2, 4), (2, 4)]
