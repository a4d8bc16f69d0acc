"""Failures and aborts, which must not affect other requests."""

import pytest

from llmsrv.backend.arrays import Array
from llmsrv.backend.sampling.samples import Samples
from llmsrv.backend.sampling.table import SamplingTable
from llmsrv.engine.messages import Abort
from llmsrv.engine.messages import Sampling
from llmsrv.engine.messages import Submit
from llmsrv.engine.sampling import write_sampling
from llmsrv.engine.sequence import Sequence
from llmsrv.engine.validation import check_submit
from tests.support.cores import alone
from tests.support.cores import Engine
from tests.support.cores import GREEDY
from tests.support.cores import healthy_prompt
from tests.support.fake_plan import NAN_ID
from tests.support.fake_plan import VOCAB_SIZE


@pytest.mark.parametrize(
    ("fields", "code", "message"),
    [
        ({"prompt_ids": [1] * 200}, "context_length_exceeded", "200 tokens"),
        ({"prompt_ids": []}, "bad_request", "empty"),
        ({"prompt_ids": [1, VOCAB_SIZE]}, "bad_request", "not in"),
        ({"prompt_ids": [-1, 1]}, "bad_request", "not in"),
        ({"max_tokens": -1}, "bad_request", "at least 0"),
        ({"n": 0}, "bad_request", "at least 1"),
        ({"sampling": Sampling(seed=1, temperature=float("nan"))}, "invalid_value", "temperature"),
        ({"sampling": Sampling(seed=1, top_p=1.5)}, "invalid_value", "top_p"),
        ({"sampling": Sampling(seed=-1)}, "invalid_value", "seed"),
        ({"sampling": Sampling(seed=1, top_k=2**31)}, "invalid_value", "top_k"),
    ],
)
def test_an_invalid_request_fails_at_once_and_alone(
    fields: dict[str, object], code: str, message: str
) -> None:
    engine = Engine()
    healthy = engine.submit(1, healthy_prompt(3))
    bad = {"prompt_ids": [1, 2], "max_tokens": 3, "end_ids": [], "sampling": GREEDY, **fields}
    engine.core.submit(Submit(request=2, **bad))  # type: ignore[arg-type]
    engine.step()
    assert engine.failed[2].code == code and message in engine.failed[2].message
    assert engine.failed[2].status == 400
    engine.run()
    assert engine.outputs[1, 0] == alone(healthy)[0]
    engine.assert_idle()


def test_a_failure_is_reported_even_if_nothing_runs() -> None:
    engine = Engine()
    engine.submit(1, [])
    assert engine.core.has_work
    engine.step()
    assert 1 in engine.failed and not engine.core.has_work


def test_a_row_without_usable_logits_fails_its_request_and_no_other() -> None:
    engine = Engine()
    others = [engine.submit(r, healthy_prompt(3 + r, r)) for r in (1, 2)]
    engine.submit(3, [4, NAN_ID], n=2)
    engine.run()
    assert engine.failed[3].status == 500 and "not a number" in engine.failed[3].message
    assert not any(request == 3 for request, _ in engine.finished)
    for submit in others:
        assert engine.outputs[submit.request, 0] == alone(submit)[0]
    engine.assert_idle()


def test_an_exception_for_one_request_inside_a_step_fails_it_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine()
    advance = engine.core._append_token

    def faulty(row, *rest):  # type: ignore[no-untyped-def]
        if row.sequence.submit.request == 2:
            raise RuntimeError("a fault for this request")
        advance(row, *rest)

    monkeypatch.setattr(engine.core, "_append_token", faulty)
    healthy = engine.submit(1, healthy_prompt(3))
    engine.submit(2, healthy_prompt(3), n=2)
    engine.run()
    assert engine.failed[2].status == 500 and "fault" not in engine.failed[2].message
    assert "a fault for this request" in caplog.text
    assert engine.outputs[1, 0] == alone(healthy)[0]
    engine.assert_idle()


def test_an_exception_at_admission_fails_that_request_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine()

    def faulty(submit: Submit, context_length: int, vocab_size: int) -> None:
        if submit.request == 2:
            raise MemoryError
        check_submit(submit, context_length, vocab_size)

    monkeypatch.setattr("llmsrv.engine.core.check_submit", faulty)
    engine.submit(2, [1, 2])
    engine.submit(1, healthy_prompt(3))
    engine.run()
    assert engine.failed[2].status == 500
    assert engine.finished[1, 0].reason == "length"
    engine.assert_idle()


def test_an_exception_while_filling_a_slot_fails_that_request_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def faulty(table: SamplingTable, sequence: Sequence) -> None:
        if sequence.submit.request == 2:
            raise MemoryError
        write_sampling(table, sequence)

    monkeypatch.setattr("llmsrv.engine.core.write_sampling", faulty)
    engine = Engine()
    engine.submit(2, healthy_prompt(3), n=2)
    healthy = engine.submit(1, healthy_prompt(3))
    engine.run()
    assert engine.failed[2].status == 500 and engine.admitted == [1]
    assert engine.outputs[1, 0] == alone(healthy)[0]
    engine.assert_idle()


def test_an_exception_of_the_model_itself_is_raised() -> None:
    engine = Engine()

    def broken(batch: object) -> None:
        raise FloatingPointError("the kernel is broken")

    engine.plan.forward = broken  # type: ignore[method-assign]
    engine.submit(1, [1, 2])
    with pytest.raises(FloatingPointError):
        engine.step()


@pytest.mark.parametrize("num_steps", [0, 1, 3, 6, 9])
def test_an_abort_while_waiting_in_prefill_or_in_decode_frees_everything(num_steps: int) -> None:
    engine = Engine(max_rows=8, max_sequences=1)
    engine.submit(1, healthy_prompt(40, steps=50), max_tokens=50)
    engine.submit(2, healthy_prompt(3))
    for _ in range(num_steps):
        engine.step()
    engine.core.abort(Abort(1))
    engine.core.abort(Abort(2))
    engine.core.abort(Abort(2))
    engine.core.abort(Abort(99))
    step = engine.step()
    assert {(f.request, f.reason) for f in step.finished} == {(1, "abort"), (2, "abort")}
    assert not engine.core.has_work
    engine.assert_idle()


def test_aborting_one_choice_leaves_the_others() -> None:
    engine = Engine(max_sequences=3)
    engine.submit(1, healthy_prompt(3), n=3)
    engine.step()
    engine.core.abort(Abort(1, choice=1))
    engine.run()
    assert [engine.finished[1, c].reason for c in range(3)] == ["length", "abort", "length"]
    engine.assert_idle()


def test_a_failing_choice_fails_the_choices_after_it_in_the_same_step() -> None:
    """A sequence that is no longer running must not receive its sample."""
    engine = Engine(max_sequences=3)
    sample = engine.plan.sample

    def first_row_fails(*rows: Array | None) -> Samples:
        samples = sample(*rows)
        samples.ids[0] = -1
        return samples

    engine.plan.sample = first_row_fails  # type: ignore[method-assign]
    engine.submit(1, healthy_prompt(3), n=3)
    step = engine.step()
    assert [f.request for f in step.failed] == [1] and not step.tokens and not step.finished
    engine.run()
    engine.assert_idle()
