"""Running ahead of the tokens changes no result, with a plan that computes at once and with an
asynchronous one."""

from collections.abc import Iterable
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path

import pytest

from llmsrv.backend.base import Backend
from llmsrv.backend.base import Batch
from llmsrv.backend.base import Limits
from llmsrv.backend.base import Plan
from llmsrv.backend.cuda.backend import CUDABackend
from llmsrv.backend.cuda.backend import CUDAOptions
from llmsrv.backend.reference.backend import ReferenceBackend
from llmsrv.config import default_cache_dir
from llmsrv.engine.core import EngineCore
from llmsrv.engine.grammar import Grammar
from llmsrv.engine.grammar import GrammarCompiler
from llmsrv.engine.messages import Abort
from llmsrv.engine.messages import Sampling
from llmsrv.engine.messages import Submit
from llmsrv.engine.scheduler import NUM_RECENT_OUTPUTS
from llmsrv.model.load import load_model
from llmsrv.text.grammar import choice_source
from llmsrv.text.grammar import load_ll_tokenizer
from tests.support.cores import GREEDY
from tests.support.cuda import mode
from tests.support.cuda import needs_emulation
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


TOO_SLOW_ON_A_DEVICE = "greedy", "penalties", "chunked prefill", "a small cache and choices"
ON_A_DEVICE = [name for name in CASES if name not in TOO_SLOW_ON_A_DEVICE]


class TinyModel:
    """A small random model on a backend, and a compiler for grammars over it."""

    def __init__(self, path: Path, backend: Backend) -> None:
        self._backend = backend
        self._program = load_model(path, lambda: None).program
        self.compiler = GrammarCompiler(
            lambda: load_ll_tokenizer(path, path.parent, VOCAB_SIZE), VOCAB_SIZE
        )

    def make_plan(self, limits: Limits) -> Plan:
        return self._backend.compile(self._program, limits, lambda: None)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    return write_tiny_llama(folder / "tiny.gguf", vocab_size=VOCAB_SIZE)


@pytest.fixture(scope="module")
def model(path: Path) -> TinyModel:
    return TinyModel(path, ReferenceBackend())


@pytest.fixture
def cuda_model(path: Path) -> Iterator[TinyModel]:
    """On the CUDA backend, whose work runs as late as it may.  Answers do not depend on the batch,
    which differs when running ahead."""
    with mode(is_lazy=True):
        options = CUDAOptions(default_cache_dir(), batch_invariant=True, warms_up=False)
        yield TinyModel(path, CUDABackend(options))


@dataclass
class Results:
    """Everything that clients see, by request and choice."""

    ids: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    alternative_ids: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    logprobs: dict[tuple[int, int], list[float]] = field(default_factory=dict)  # of both ids
    ends: dict[tuple[int, int], tuple[str, int]] = field(default_factory=dict)
    num_preemptions: int = 0


class PipelinedRun:
    """Runs a case, and counts the steps that were enqueued ahead."""

    def __init__(self, model: TinyModel, case: Case, is_pipelined: bool) -> None:
        limits = Limits(case.max_rows, case.max_sequences + 3, case.max_sequences, case.blocks + 1)
        self.plan = model.make_plan(limits)
        forward = self.plan.forward
        self.num_ahead = 0

        def recording(batch: Batch) -> None:
            self.num_ahead += bool((batch.ids < 0).any())
            forward(batch)

        self.plan.forward = recording  # type: ignore[method-assign]
        self.core = EngineCore(
            self.plan,
            limits,
            128,
            VOCAB_SIZE,
            clock=lambda: 1.0,
            compile_grammar=lambda source: compiled(model.compiler, source),
            is_pipelined=is_pipelined,
        )
        self.core._scheduler.recent_outputs.extend([0] * NUM_RECENT_OUTPUTS)  # rather preempt
        self.results = Results()
        self.num_steps = 0
        self._case = case

    def run(self, abort_after: int | None = None, abort: Abort = Abort(1)) -> Results:
        """Submits and runs all requests, and aborts one after abort_after steps."""
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
    """Compiles at once, so that both runs get the grammar in the same step."""
    future = compiler.compile(source)
    future.result()
    return future


@pytest.mark.parametrize("name", CASES)
def test_running_ahead_changes_no_result(name: str, model: TinyModel) -> None:
    check_that_running_ahead_changes_no_result(CASES[name], model)


@needs_emulation
@pytest.mark.parametrize("name", slow_but(ON_A_DEVICE, "end ids"))
def test_running_ahead_of_a_device_changes_no_result(name: str, cuda_model: TinyModel) -> None:
    check_that_running_ahead_changes_no_result(CASES[name], cuda_model)


def check_that_running_ahead_changes_no_result(case: Case, model: TinyModel) -> None:
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
    check_aborts(CASES[name], model, range(40))


@needs_emulation
@pytest.mark.slow
@pytest.mark.parametrize("name", ["seeded", "a small cache"])
def test_an_abort_on_a_device_changes_nothing_for_others(name: str, cuda_model: TinyModel) -> None:
    check_aborts(CASES[name], cuda_model, (1, 8))


def check_aborts(case: Case, model: TinyModel, after: Iterable[int]) -> None:
    """after: the numbers of steps after which to abort a request."""
    expected = PipelinedRun(model, case, is_pipelined=False).run()
    for num_steps in after:
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
