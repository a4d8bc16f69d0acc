"""The engine without its process, over a plan that notices every wrong block and position."""

import math
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle
from hypothesis.stateful import RuleBasedStateMachine
from hypothesis.stateful import consumes
from hypothesis.stateful import invariant
from hypothesis.stateful import precondition
from hypothesis.stateful import rule

from llmsrv.backend.arrays import Array
from llmsrv.backend.base import BLOCK_SIZE
from llmsrv.backend.base import Limits
from llmsrv.backend.base import Plan
from llmsrv.backend.reference.backend import ReferenceBackend
from llmsrv.backend.sampling.samples import Samples
from llmsrv.backend.sampling.table import SamplingTable
from llmsrv.engine.messages import Abort
from llmsrv.engine.messages import Failed
from llmsrv.engine.messages import PROMPT
from llmsrv.engine.messages import Sampling
from llmsrv.engine.messages import Submit
from llmsrv.engine.sampling import write_sampling
from llmsrv.engine.scheduler import MIN_PREFILL_ROWS_WITH_DECODE
from llmsrv.engine.sequence import Sequence
from llmsrv.engine.validation import check_submit
from llmsrv.model.load import load_model
from tests.support.async_plan import AsyncFakePlan
from tests.support.cores import Engine
from tests.support.cores import GREEDY
from tests.support.cores import alone
from tests.support.cores import healthy_prompt
from tests.support.fake_plan import FakePlan
from tests.support.fake_plan import NAN_ID
from tests.support.fake_plan import VOCAB_SIZE
from tests.support.gguf_writer import write_tiny_llama
from tests.support.parameters import slow_but


def test_a_request_puts_out_its_tokens_and_one_finish() -> None:
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


def test_the_context_ends_a_choice_with_length() -> None:
    engine = Engine(context=32)
    engine.submit(1, healthy_prompt(30, steps=40), max_tokens=1000)
    engine.submit(2, healthy_prompt(31, steps=40), max_tokens=1000)
    engine.run()
    assert [engine.finished[r, 0].num_output_tokens for r in (1, 2)] == [2, 1]
    assert engine.finished[1, 0].reason == "length"
    engine.assert_idle()


@pytest.mark.parametrize("blocks", slow_but([2, 3, 40], 2, 3))
@pytest.mark.parametrize("length", [15, 16, 17, 31])
def test_one_sequence_may_fill_the_whole_cache(blocks: int, length: int) -> None:
    engine = Engine(blocks=blocks, context=1000)
    prompt = healthy_prompt(length, steps=blocks * BLOCK_SIZE - length)
    submit = engine.submit(1, prompt, max_tokens=1000)
    engine.run()
    expected = alone(submit, context=blocks * BLOCK_SIZE)[0]
    assert engine.outputs[1, 0] == expected and len(prompt + expected) == blocks * BLOCK_SIZE
    engine.assert_idle()


@pytest.mark.parametrize(
    ("fields", "code", "message"),
    [
        ({"prompt_ids": [1] * 200}, "context_length_exceeded", "200 tokens"),
        ({"prompt_ids": []}, "bad_request", "empty"),
        ({"prompt_ids": [1, VOCAB_SIZE]}, "bad_request", "not in"),
        ({"prompt_ids": [-1, 1]}, "bad_request", "not in"),
        ({"max_tokens": 0}, "bad_request", "at least 1"),
        ({"n": 0}, "bad_request", "at least 1"),
        ({"sampling": Sampling(seed=1, temperature=float("nan"))}, "invalid_value", "temperature"),
        ({"sampling": Sampling(seed=1, top_p=1.5)}, "invalid_value", "top_p"),
        ({"sampling": Sampling(seed=-1)}, "invalid_value", "seed"),
        ({"sampling": Sampling(seed=1, top_k=2**31)}, "invalid_value", "top_k"),
    ],
)
def test_what_can_never_be_computed_fails_at_once_and_alone(
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


def test_a_failure_is_reported_although_nothing_runs() -> None:
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


def test_an_exception_when_a_slot_is_taken_fails_that_request_alone(
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


def test_choices_are_drawn_by_their_index_and_position() -> None:
    engine = Engine(max_sequences=3)
    submit = engine.submit(1, [3, 1, 4], sampling=Sampling(seed=12345), n=5)
    engine.run()
    outputs = [engine.outputs[1, choice] for choice in range(5)]
    assert outputs == [alone(submit, choice)[0] for choice in range(5)]
    assert len(set(map(tuple, outputs))) == 5
    assert 1 in engine.admitted
    engine.assert_idle()


def test_log_probabilities_come_where_they_were_asked_for() -> None:
    engine = Engine()
    prompt = healthy_prompt(3)
    for request, num_logprobs in enumerate((-1, 0, 3)):
        engine.submit(request, prompt, sampling=Sampling(0, 0.0, num_logprobs=num_logprobs))
    tokens = {t.request: t for t in engine.step().tokens}
    assert tokens[0].logprobs == [] and tokens[0].alternatives == []
    assert tokens[1].logprobs == [-0.5] and tokens[1].alternatives == [[]]
    assert tokens[2].alternatives == [[(0, -1.0), (1, -2.0), (2, -3.0)]]


def test_running_streams_go_on_during_a_long_prefill() -> None:
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


def test_more_sequences_than_rows_of_prefill_starve_nobody() -> None:
    engine = Engine(max_rows=4, max_sequences=4)
    for request in range(8):
        engine.submit(request, healthy_prompt(40, request, steps=40), max_tokens=40)
    engine.run(2000)
    assert len(engine.finished) == 8
    engine.assert_idle()


def test_sixty_four_long_requests_in_a_cache_for_eight_all_finish_as_if_alone() -> None:
    engine = Engine(max_sequences=32, blocks=8 * 4, max_rows=64, context=64)
    submits = [
        engine.submit(r, healthy_prompt(10 + r % 7, r, steps=45), max_tokens=45) for r in range(64)
    ]
    engine.run(5000)
    assert engine.gauges.num_preemptions > 0
    for submit in submits:
        assert engine.outputs[submit.request, 0] == alone(submit)[0]
    engine.assert_idle()


def test_the_youngest_gives_way_and_sends_no_token_twice() -> None:
    engine = Engine(max_sequences=2, blocks=4, context=64)
    older = engine.submit(1, healthy_prompt(14, steps=45), max_tokens=45)
    younger = engine.submit(2, healthy_prompt(14, 50, steps=45), max_tokens=45)
    ended = []
    while engine.core.has_work:
        ended += [f.request for f in engine.step().finished]
    assert ended == [1, 2] and engine.gauges.num_preemptions >= 1
    assert engine.outputs[1, 0] == alone(older)[0]
    assert engine.outputs[2, 0] == alone(younger)[0]
    assert engine.admitted == [1, 2]  # once each, although the younger was admitted again
    engine.assert_idle()


def test_what_a_request_shares_with_an_earlier_one_is_not_computed_again() -> None:
    engine = Engine(max_rows=16)
    shared = healthy_prompt(100, steps=20)
    first = engine.submit(1, shared)
    engine.run()
    second = engine.submit(2, shared)
    third = engine.submit(3, shared[:50] + [9, 9, 9])
    before = engine.plan.num_forwards
    engine.run()
    assert engine.num_cached == [0, 99, 50]
    assert engine.plan.num_forwards - before < 100 // 16 + 10
    for submit in (first, second, third):
        assert engine.outputs.get((submit.request, 0), []) == alone(submit)[0]
    assert engine.gauges.num_prefix_queries == 100 + 100 + 53
    assert engine.gauges.num_prefix_hits == 99 + 50
    engine.assert_idle()


def test_a_conversation_finds_its_own_answer_in_the_cache() -> None:
    engine = Engine()
    prompt = healthy_prompt(20, steps=40)
    engine.submit(1, prompt, max_tokens=40)
    engine.run()
    engine.submit(2, prompt + engine.outputs[1, 0] + [5], max_tokens=1)
    engine.run()
    assert engine.num_cached[-1] == 59  # all positions that were computed


def test_a_prompt_that_is_known_whole_computes_its_last_token() -> None:
    engine = Engine()
    prompt = healthy_prompt(32, steps=3)
    for request in (1, 2):
        engine.submit(request, prompt, max_tokens=2)
        engine.run()
    assert engine.num_cached == [0, 31]
    assert engine.outputs[1, 0] == engine.outputs[2, 0]


def test_requests_of_different_salts_share_nothing() -> None:
    engine = Engine()
    prompt = healthy_prompt(40, steps=3)
    for request, salt in enumerate((b"a", b"b", b"a")):
        engine.submit(request, prompt, max_tokens=1, salt=salt)
        engine.run()
    assert engine.num_cached == [0, 0, 39]


def test_the_choices_of_a_request_share_its_prompt_while_they_run() -> None:
    engine = Engine(max_sequences=4, blocks=9, context=120)
    submit = engine.submit(1, healthy_prompt(64, steps=30), n=4, sampling=Sampling(seed=5))
    engine.run()  # four times 64 positions would be 16 blocks
    assert engine.num_cached == [0, 63, 63, 63]
    for choice in range(4):
        assert engine.outputs[1, choice] == alone(submit, choice)[0]
    engine.assert_idle()


def test_what_was_let_go_longest_ago_is_forgotten_first() -> None:
    engine = Engine(blocks=8, context=120)
    old, new, other = (healthy_prompt(48, start, steps=3) for start in (1, 3, 5))
    for request, prompt in enumerate((old, new, other, new, old)):
        engine.submit(request, prompt, max_tokens=1)
        engine.run()
    assert engine.num_cached == [0, 0, 0, 47, 16]  # of the old one its end, not its beginning
    engine.assert_idle()


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
    """A sequence that is no longer running must not take its sample."""
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


class Anything(RuleBasedStateMachine):
    """Submits, steps, aborts and whatever else in any order, in a cache that is far too small."""

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
    def time_goes_on(self) -> None:
        self.now_s += 10

    @precondition(lambda self: self.engine.core._scheduler.running)
    @rule()
    def preempt(self) -> None:
        self.engine.core._scheduler._preempt_last()

    @precondition(lambda self: self.engine.core._scheduler.running)
    @rule()
    def crash(self) -> None:
        """The engine's client fails what was in it; a new engine knows nothing of that."""

        def broken(batch: object) -> None:
            raise FloatingPointError

        before, self.engine = self.engine, self.new_engine()
        before.plan.forward = broken  # type: ignore[method-assign]
        with suppress(FloatingPointError):
            before.core.step()  # nothing that it reports is heard
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
        """Exactly one terminal event a choice, and the output that it has alone."""
        for request, submit in self.submits.items():
            self.check_told(submit)
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

    def check_told(self, submit: Submit) -> None:
        """What was told of the prompt is its beginning, and all of it before an output."""
        told = self.engine.outputs.get((submit.request, PROMPT), [])
        assert told == submit.prompt_ids[1 : 1 + len(told)]
        if submit.prompt_logprobs and (submit.request, 0) in self.engine.outputs:
            assert len(told) == len(submit.prompt_ids) - 1

    def teardown(self) -> None:
        self.engine.run()
        self.engine.step()
        self.engine.assert_idle()
        self.check_ends()


class AnythingPipelined(Anything):
    """The same on an asynchronous plan, without drafts, so that the core runs ahead."""

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


def test_the_arrays_of_a_step_keep_their_types_when_sequences_differ_in_length() -> None:
    """FakePlan checks the types; here the tables are as wide as the longest sequence needs."""
    engine = Engine(max_rows=64)
    widths = []
    forward = engine.plan.forward

    def noting(batch):  # type: ignore[no-untyped-def]
        widths.append(batch.block_tables.shape)
        assert np.array_equal(batch.block_tables[0, 1:], np.zeros(batch.block_tables.shape[1] - 1))
        forward(batch)

    engine.plan.forward = noting  # type: ignore[method-assign]
    engine.submit(1, healthy_prompt(3), max_tokens=2)
    engine.submit(2, healthy_prompt(50), max_tokens=2)
    engine.run()
    assert widths == [(2, 4), (2, 4)]


@pytest.fixture(scope="module")
def reference_plan(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Limits], Plan]:
    """Makes plans of a tiny llama on the reference backend."""
    path = write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny.gguf")
    program = load_model(path, lambda: None).program
    return lambda limits: ReferenceBackend().compile(program, limits, lambda: None)


def test_a_real_plan_gives_the_same_tokens_under_preemption_as_alone(
    reference_plan: Callable[[Limits], Plan],
) -> None:
    samplings = [GREEDY, Sampling(seed=11), Sampling(seed=12, temperature=0.7, top_p=0.9)]
    requests = [(healthy_prompt(9 + 5 * r, r), samplings[r % 3]) for r in range(9)]
    crowd = Engine(max_sequences=5, blocks=8, max_rows=16, make_plan=reference_plan)
    for request, (prompt, sampling) in enumerate(requests):
        crowd.submit(request, prompt, sampling=sampling, max_tokens=25)
    crowd.run()
    assert crowd.gauges.num_preemptions > 0
    crowd.assert_idle()
    for request, (prompt, sampling) in enumerate(requests):
        single = Engine(max_rows=64, make_plan=reference_plan)
        single.submit(request, prompt, sampling=sampling, max_tokens=25)
        single.run()
        assert single.outputs == {(request, 0): crowd.outputs[request, 0]}


def test_the_fake_plan_behaves_as_the_real_one(reference_plan: Callable[[Limits], Plan]) -> None:
    """The same requests make the same steps, since neither says when a sequence has to end."""
    kinds: list[list[object]] = []
    for make_plan in (FakePlan, reference_plan):
        engine = Engine(
            max_sequences=3,
            blocks=7,
            max_rows=8,
            context=64,
            make_plan=make_plan,
            clock=lambda: 1.0,  # what steps cost is not the same
        )
        for request in range(5):
            sampling = Sampling(0, 0.0, num_logprobs=request % 3 - 1)
            engine.submit(
                request,
                healthy_prompt(5 + 9 * request, request, steps=20),
                n=1 + request % 2,
                max_tokens=20,
                sampling=sampling,
            )
        kinds.append([])
        while engine.core.has_work:
            step = engine.step()
            tokens = [
                (t.request, t.choice, len(t.ids), len(t.logprobs), [len(a) for a in t.alternatives])
                for t in step.tokens
            ]
            ends = [(f.request, f.choice, f.reason) for f in step.finished]
            kinds[-1].append((step.admitted, tokens, ends, step.gauges))
        engine.assert_idle()
    assert kinds[0] == kinds[1]
