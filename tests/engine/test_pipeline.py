"""Running ahead: the results of plain stepping, with step n + 1 enqueued before step n is read."""

from collections.abc import Callable
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path

import numpy as np
import pytest

from llmsrv.backend.base import Batch
from llmsrv.backend.base import Limits
from llmsrv.backend.base import PendingSamples
from llmsrv.backend.base import Plan
from llmsrv.backend.reference.backend import ReferenceBackend
from llmsrv.backend.sampling.samples import Samples
from llmsrv.backend.sampling.table import Mask
from llmsrv.engine.core import EngineCore
from llmsrv.engine.grammar import Grammar
from llmsrv.engine.grammar import GrammarCompiler
from llmsrv.engine.messages import Abort
from llmsrv.engine.messages import Sampling
from llmsrv.engine.messages import Submit
from llmsrv.model.load import load_model
from llmsrv.text.grammar import choice_source
from llmsrv.text.grammar import read_vocabulary
from tests.support.async_plan import AsyncFakePlan
from tests.support.cores import Engine
from tests.support.cores import GREEDY
from tests.support.cores import alone
from tests.support.cores import healthy_prompt
from tests.support.fake_plan import NAN_ID
from tests.support.gguf_writer import write_tiny_llama
from tests.support.parameters import slow_but

VOCAB_SIZE = 320
SEEDED = Sampling(seed=7, temperature=0.9)
WITH_LOGPROBS = Sampling(seed=8, temperature=0.9, num_logprobs=3)
PENALIZED = Sampling(seed=9, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.4)


@dataclass(frozen=True)
class Case:
    """Requests that arrive some steps apart, and the limits of their engine."""

    submits: list[Submit]
    steps_between: int = 0
    max_rows: int = 32
    max_sequences: int = 4
    blocks: int = 64
    expects_preemption: bool = False


def request(number: int, length: int = 9, **fields: object) -> Submit:
    prompt = [(number * 31 + 7 * i) % 250 + 3 for i in range(length)]
    values = {"max_tokens": 20, "end_ids": [], "sampling": GREEDY, **fields}
    return Submit(number, prompt, **values)  # type: ignore[arg-type]


CASES = {
    "greedy": Case([request(n, 5 + n) for n in range(4)]),
    "seeded": Case([request(n, 15 + n, sampling=SEEDED) for n in range(3)]),
    "log-probabilities": Case([request(1, sampling=WITH_LOGPROBS), request(2)]),
    "penalties": Case([request(n, sampling=PENALIZED, max_tokens=40) for n in range(3)]),
    "choices": Case([request(1, 33, n=3, sampling=SEEDED), request(2, n=3, sampling=SEEDED)]),
    "end ids": Case([request(n, sampling=SEEDED, end_ids=[*range(0, 320, 9)]) for n in range(6)]),
    "min_tokens": Case(
        [request(n, sampling=SEEDED, end_ids=[*range(0, 320, 3)], min_tokens=5) for n in range(4)]
    ),
    "max_tokens": Case([request(n, max_tokens=1 + n % 3) for n in range(6)]),
    "the context": Case([request(1, 120, max_tokens=500), request(2, 127, max_tokens=500)]),
    "a grammar joins": Case(
        [request(1), request(2, grammar=choice_source(["yes", "no"]), n=2), request(3)], 3
    ),
    "prompt log-probabilities join": Case(
        [
            request(1, max_tokens=40),
            request(2, 20, prompt_logprobs=True, sampling=WITH_LOGPROBS, n=2),
            request(3),
        ],
        3,
    ),
    "a small cache": Case(
        [request(n, 9 + 5 * n, sampling=SEEDED, max_tokens=30) for n in range(6)],
        blocks=8,
        expects_preemption=True,
    ),
    "a small cache and choices": Case(
        [request(n, 20, sampling=PENALIZED, n=3, max_tokens=60) for n in range(3)],
        blocks=8,
        expects_preemption=True,
    ),
    "chunked prefill": Case(
        [request(1, 4, max_tokens=40), request(2, 100), request(3, 90)], 2, max_rows=8
    ),
    "shared prefixes": Case([request(1, 50), request(1, 70), request(1, 49)], 25, max_rows=64),
}


class TinyModel:
    """A small random model on the reference backend, and a compiler for grammars over it."""

    def __init__(self, path: Path) -> None:
        self._program = load_model(path, lambda: None).program
        self.compiler = GrammarCompiler(
            lambda: read_vocabulary(path, path.parent, VOCAB_SIZE), VOCAB_SIZE
        )

    def make_plan(self, limits: Limits) -> Plan:
        return ReferenceBackend().compile(self._program, limits, lambda: None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    folder = tmp_path_factory.mktemp("pipeline")
    return TinyModel(write_tiny_llama(folder / "tiny.gguf", vocab_size=VOCAB_SIZE))


@dataclass
class Results:
    """Everything that clients see, by request and choice."""

    ids: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    alternative_ids: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    logprobs: dict[tuple[int, int], list[float]] = field(default_factory=dict)  # of all these ids
    ends: dict[tuple[int, int], tuple[str, int]] = field(default_factory=dict)
    num_preemptions: int = 0


class PipelinedRun:
    """Runs a case; notes how many steps were enqueued ahead."""

    def __init__(self, model: TinyModel, case: Case, is_pipelined: bool) -> None:
        limits = Limits(case.max_rows, case.max_sequences + 3, case.max_sequences, case.blocks + 1)
        self.plan = model.make_plan(limits)
        forward = self.plan.forward
        self.num_ahead = 0

        def noting(batch: Batch) -> None:
            self.num_ahead += bool((batch.ids < 0).any())
            forward(batch)

        self.plan.forward = noting  # type: ignore[method-assign]
        self.core = EngineCore(
            self.plan,
            limits,
            128,
            VOCAB_SIZE,
            clock=lambda: 1.0,
            compile_grammar=lambda source: compiled(model.compiler, source),
            is_pipelined=is_pipelined,
        )
        self.results = Results()
        self.num_steps = 0
        self._case = case

    def run(self, abort_after: int | None = None, abort: Abort = Abort(1)) -> Results:
        """Submits and runs all requests.  Aborts one after that many steps."""
        for number, submit in enumerate(self._case.submits):
            self.core.submit(Submit(**{**fields_of(submit), "request": number}))
            for _ in range(self._case.steps_between):
                self.step(abort_after, abort)
        while self.core.has_work:
            self.step(abort_after, abort)
        cache = self.core._kv_cache
        assert cache.num_free + cache.num_used == cache.num_total and cache.num_used == 0
        assert sorted(self.core._scheduler._free_slots) == list(range(self._case.max_sequences))
        return self.results

    def step(self, abort_after: int | None, abort: Abort) -> None:
        if self.num_steps == abort_after:
            self.core.abort(abort)
        self.num_steps += 1
        step, results = self.core.step(), self.results
        assert not any(
            sequence.has_placeholder
            for sequences in self.core._sequences.values()
            for sequence in sequences
        )
        for each in step.tokens:
            key = each.request, each.choice
            pairs = [pair for alternatives in each.alternatives for pair in alternatives]
            results.ids.setdefault(key, []).extend(each.ids)
            results.alternative_ids.setdefault(key, []).extend(id for id, _ in pairs)
            logprobs = [*each.logprobs, *(logprob for _, logprob in pairs)]
            results.logprobs.setdefault(key, []).extend(logprobs)
        for end in step.finished:
            key = end.request, end.choice
            assert end.num_output_tokens == len(results.ids.get(key, []))
            results.ends[key] = end.reason, end.num_output_tokens
        assert not step.failed
        results.num_preemptions = step.gauges.num_preemptions


def fields_of(submit: Submit) -> dict[str, object]:
    return {name: getattr(submit, name) for name in submit.__struct_fields__}


def compiled(compiler: GrammarCompiler, source: str) -> Future[Grammar]:
    """Waits, so that both runs get the grammar in the same step."""
    future = compiler.compile(source)
    future.result()
    return future


@pytest.mark.parametrize("name", CASES)
def test_running_ahead_changes_no_result(name: str, model: TinyModel) -> None:
    case = CASES[name]
    plain, ahead = (PipelinedRun(model, case, is_pipelined) for is_pipelined in (False, True))
    expected, results = plain.run(), ahead.run()
    assert results.ids == expected.ids and results.ends == expected.ends
    assert results.alternative_ids == expected.alternative_ids
    for key, logprobs in expected.logprobs.items():
        assert results.logprobs[key] == pytest.approx(logprobs, abs=1e-4)
    assert plain.num_ahead == 0 and ahead.num_ahead > 0
    if case.expects_preemption:
        assert results.num_preemptions > 0


@pytest.mark.parametrize(
    "name", slow_but(["seeded", "choices", "chunked prefill", "a small cache"], "seeded")
)
def test_an_abort_after_any_step_changes_nothing_for_others(name: str, model: TinyModel) -> None:
    case = CASES[name]
    expected = PipelinedRun(model, case, is_pipelined=False).run()
    for num_steps in range(40):
        run = PipelinedRun(model, case, is_pipelined=True)
        abort = Abort(1, choice=0 if num_steps % 2 else None)
        results = run.run(num_steps, abort)
        for key, ids in expected.ids.items():
            received = results.ids.get(key, [])
            if results.ends[key] == ("abort", len(received)):
                assert key in ((1, 0), (1, abort.choice or key[1]))
                assert received == ids[: len(received)]
            else:
                assert received == ids and results.ends[key] == expected.ends[key]


# ---- The order of events on an asynchronous plan


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


def test_a_failed_row_fails_its_request_and_the_row_behind_it_is_dropped() -> None:
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
    assert plan.num_ahead == 20 - 7  # the token after the last one of the grammar waits too
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
