"""Speculative decoding: the tokens of plain decoding, in fewer steps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmsrv.backend.base import Batch
from llmsrv.backend.base import Limits
from llmsrv.backend.base import Plan
from llmsrv.backend.reference.backend import ReferenceBackend
from llmsrv.backend.sampling.samples import Samples
from llmsrv.engine.acceptance import AcceptanceRates
from llmsrv.engine.acceptance import DraftSource
from llmsrv.engine.acceptance import source_of_match
from llmsrv.engine.lookup import Lookup
from llmsrv.engine.messages import Sampling
from llmsrv.engine.speculation import Speculation
from llmsrv.engine.step_costs import StepCosts
from llmsrv.model.load import load_model
from tests.engine.test_scheduler import Clock
from tests.engine.test_scheduler import gaps_of
from tests.support.cores import Engine
from tests.support.cores import GREEDY
from tests.support.cores import alone
from tests.support.cores import healthy_prompt
from tests.support.fake_plan import FakePlan
from tests.support.fake_plan import NAN_ID
from tests.support.fake_plan import VOCAB_SIZE
from tests.support.gguf_writer import write_tiny_llama


def engine_of(draft_length: int | None, **limits: int) -> Engine:
    sizes = {"blocks": 200, "context": 1000, "spare_logit_rows": 32, "max_rows": 64, **limits}
    return Engine(draft_length=draft_length, clock=lambda: 1.0, **sizes)  # type: ignore[arg-type]


@pytest.mark.parametrize("draft_length", [1, 3, 16])
def test_the_output_is_that_of_plain_decoding(draft_length: int) -> None:
    engine = engine_of(draft_length)
    samplings = [GREEDY, Sampling(seed=5), Sampling(seed=6, num_logprobs=2)]
    submits = [
        engine.submit(r, healthy_prompt(9 + r, r), sampling=samplings[r % 3], max_tokens=80, n=2)
        for r in range(6)
    ]
    engine.run()
    assert engine.gauges.num_accepted_tokens > 100
    for submit in submits:
        for choice in range(2):
            expected, reason = alone(submit, choice, context=1000)
            output = engine.outputs.get((submit.request, choice), [])
            if submit.request in engine.failed:
                assert output == expected[: len(output)]
            else:
                finished = engine.finished[submit.request, choice]
                assert (output, finished.reason) == (expected, reason)
    engine.assert_idle()


def test_a_text_that_repeats_itself_takes_a_fraction_of_the_steps() -> None:
    prompt = healthy_prompt(20, steps=300)
    num_forwards = []
    for draft_length in (None, 8):
        engine = engine_of(draft_length)
        engine.submit(1, prompt, max_tokens=300)
        engine.run()
        num_forwards.append(engine.plan.num_forwards)  # type: ignore[attr-defined]
    assert num_forwards[0] == 300 and num_forwards[1] < 150
    gauges = engine.gauges
    assert gauges.num_drafts <= gauges.num_draft_tokens <= 8 * gauges.num_drafts
    assert 300 - num_forwards[1] == gauges.num_accepted_tokens


def test_log_probabilities_come_with_every_token_of_a_step() -> None:
    engine = engine_of(4)
    sampling = Sampling(0, 0.0, num_logprobs=2)
    engine.submit(1, healthy_prompt(20, steps=60), max_tokens=60, sampling=sampling)
    lengths = set()
    while engine.core.has_work:
        for tokens in engine.step().tokens:
            assert len(tokens.ids) == len(tokens.logprobs) == len(tokens.alternatives)
            lengths.add(len(tokens.ids))
    assert {1, 5} <= lengths


def test_an_end_among_the_drafts_ends_the_choice_there() -> None:
    prompt = healthy_prompt(20, steps=100)
    output = alone(engine_of(None).submit(1, prompt, max_tokens=100), context=1000)[0]
    for end in set(output):
        engine = engine_of(8)
        engine.submit(1, prompt, max_tokens=100, end_ids=[end])
        engine.run()
        assert engine.outputs[1, 0] == output[: output.index(end) + 1]
        assert engine.finished[1, 0].reason == "stop"
        engine.assert_idle()


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 9, 50])
def test_never_are_more_tokens_put_out_than_asked_for(max_tokens: int) -> None:
    engine = engine_of(16)
    submit = engine.submit(1, [1, 2, 3, 4, 5] * 4, max_tokens=max_tokens)
    engine.run()
    assert engine.outputs[1, 0] == alone(submit, context=1000)[0]
    assert engine.finished[1, 0].num_output_tokens == max_tokens


def test_drafts_take_no_block_that_another_sequence_needs_soon() -> None:
    plain, drafting = (
        Engine(max_sequences=4, blocks=14, context=120, spare_logit_rows=16, draft_length=length)
        for length in (None, 8)
    )
    for engine in (plain, drafting):
        for request in range(4):
            engine.submit(request, healthy_prompt(12, request, steps=70), max_tokens=70)
        engine.run()
        engine.assert_idle()
    assert drafting.outputs == plain.outputs
    assert drafting.gauges.num_drafts > 0
    assert drafting.gauges.num_preemptions <= plain.gauges.num_preemptions


class Choosy:
    """A grammar that allows everything but one id behind a draft, and once forces what comes."""

    def __init__(self, refused: int, forced: list[int]) -> None:
        self.refused = refused
        self.forces = [forced]

    def masks(self, drafts: tuple[int, ...] = ()) -> object:
        num_rows = drafts.index(self.refused) if self.refused in drafts else len(drafts)
        return np.full((1 + num_rows, -(-VOCAB_SIZE // 32)), 2**32 - 1, np.uint32)

    def accept(self, id: int) -> bool:
        return False

    def forced(self) -> list[int]:
        return self.forces.pop() if self.forces else []


def test_a_draft_is_cut_at_the_first_token_that_the_grammar_refuses() -> None:
    engine = engine_of(8)
    submit = engine.submit(1, [1, 2, 3, 4, 5] * 4, max_tokens=30)
    drafted = []
    forward = engine.plan.forward

    def noting(batch):  # type: ignore[no-untyped-def]
        drafted.append(batch.ids[1:].tolist())
        forward(batch)

    engine.step()
    refused = engine.outputs[1, 0][0]
    engine.core._sequences[1][0].grammar = Choosy(refused, [])  # type: ignore[assignment]
    engine.plan.forward = noting  # type: ignore[method-assign]
    engine.run()
    assert engine.outputs[1, 0] == alone(submit, context=1000)[0]
    assert any(drafted) and not any(refused in draft for draft in drafted)


def test_what_a_grammar_forces_is_drafted_also_where_nothing_is_looked_up() -> None:
    engine = engine_of(None)
    engine.core._costs.record(1, 0.01)
    engine.core._costs.record(16, 0.011)
    submit = engine.submit(1, healthy_prompt(20, steps=30), max_tokens=30)
    expected = alone(submit, context=1000)[0]
    engine.step()
    grammar = Choosy(-1, expected[1:6])
    engine.core._sequences[1][0].grammar = grammar  # type: ignore[assignment]
    assert engine.step().tokens[0].ids == expected[1:7]
    engine.run()
    assert engine.outputs[1, 0] == expected


@pytest.mark.parametrize("row_s, pays", [(0.0001, True), (0.02, False)])
def test_drafts_are_made_where_they_pay(row_s: float, pays: bool) -> None:
    clocks = {}
    for draft_length in (None, 0):
        clock = clocks[draft_length] = Clock(step_s=0.004, row_s=row_s)
        engine = Engine(
            max_rows=512,
            blocks=200,
            context=2000,
            make_plan=clock.make_plan,
            clock=clock,
            spare_logit_rows=32,
            draft_length=draft_length,
        )
        for request in range(2):
            engine.submit(request, healthy_prompt(20, request, steps=250), max_tokens=250)
        engine.run()
    plain_s, drafting_s = (clocks[length].now_s - 1000 for length in (None, 0))
    if pays:
        assert plain_s > 1.6 * drafting_s
    else:
        assert drafting_s < 1.05 * plain_s


def test_drafts_beside_a_prompt_are_short() -> None:
    clock = Clock(step_s=0.004, row_s=0.0004)
    engine = Engine(
        max_rows=512,
        blocks=200,
        context=2000,
        make_plan=clock.make_plan,
        clock=clock,
        spare_logit_rows=32,
        draft_length=0,
    )
    engine.submit(0, healthy_prompt(20, steps=900), max_tokens=900)
    while len(engine.outputs.get((0, 0), [])) < 300:
        engine.step()
    assert max(len(engine.step().tokens[0].ids) for _ in range(20)) > 6
    engine.submit(1, healthy_prompt(1000, 1, steps=1), max_tokens=1)
    num_tokens = len(engine.outputs[0, 0])
    gaps = gaps_of(engine, clock, 0, end=1)
    assert max(gaps) < 2.2 * (clock.step_s + clock.row_s)
    assert len(engine.outputs[0, 0]) - num_tokens > 1.5 * len(gaps)


def test_the_most_likely_drafts_come_first_when_not_all_fit() -> None:
    costs = StepCosts()
    costs.record(2, 0.01)
    costs.record(40, 0.0101)
    speculation = Speculation(costs, uses_prompt_lookup=True)
    engine = engine_of(None)
    for request in range(2):
        engine.submit(request, [1, 2, 3, 4, 5] * 4, max_tokens=100)
    sequences = [engine.core._sequences[request][0] for request in range(2)]
    for source in DraftSource:
        for _ in range(50):
            sequences[1].acceptance_rates.record(source, True)
            sequences[0].acceptance_rates.record(source, False)
    lengths = [len(draft) for draft in speculation.draft(sequences, 12)]
    assert sum(lengths) == 12 and lengths[0] < 3 < lengths[1]


@pytest.mark.parametrize("draft_length", [1, 4, 0])
def test_a_draft_model_changes_no_output(draft_length: int) -> None:
    """It is as good as the model itself: what it does not draw is what it has computed wrongly."""
    engine = Engine(
        max_sequences=5,
        blocks=16,
        max_rows=32,
        context=200,
        clock=lambda: 1.0,
        spare_logit_rows=32,
        draft_length=draft_length,
        make_draft_plan=FakePlan,
    )
    samplings = [GREEDY, Sampling(seed=5), Sampling(seed=6, temperature=0.5)]
    submits = [
        engine.submit(r, healthy_prompt(9 + 7 * r, r), sampling=samplings[r % 3], max_tokens=60)
        for r in range(8)
    ]
    engine.run()
    for submit in submits:
        expected, reason = alone(submit)
        finished = engine.finished.get((submit.request, 0))
        assert engine.outputs[submit.request, 0] == expected
        assert (finished and finished.reason) == reason
    gauges = engine.gauges
    assert gauges.num_preemptions > 0
    if draft_length:
        assert gauges.num_accepted_tokens >= 0.97 * gauges.num_draft_tokens > 10
    engine.assert_idle()


@pytest.mark.parametrize(
    "draft, least, most",
    [
        ({}, 0.97, 1.0),
        pytest.param({"layers": 1}, 0.04, 0.9, marks=pytest.mark.slow),
        ({"layers": 1, "hidden_size": 32, "num_heads": 2, "num_kv_heads": 1, "seed": 9}, 0.0, 0.9),
    ],
    ids=["itself", "its first layer", "another"],
)
def test_a_smaller_model_drafts_for_a_larger_one(
    draft: dict[str, int], least: float, most: float, tmp_path: Path
) -> None:
    """least, most: how much of its drafts is kept."""
    make_plan = reference_plans(tmp_path / "target.gguf")
    make_draft_plan = reference_plans(tmp_path / "draft.gguf", **draft)
    samplings = [GREEDY, Sampling(seed=11), Sampling(seed=12, temperature=0.7, top_p=0.9)]
    drafting = Engine(
        max_rows=32,
        spare_logit_rows=16,
        draft_length=3,
        make_plan=make_plan,
        make_draft_plan=make_draft_plan,
    )
    plain = Engine(max_rows=64, max_sequences=1, make_plan=make_plan)
    for engine in (drafting, plain):
        for request, sampling in enumerate(samplings):
            prompt = healthy_prompt(9 + 20 * request, request)
            engine.submit(request, prompt, sampling=sampling, max_tokens=40)
        engine.run()
        engine.assert_idle()
    assert drafting.outputs == plain.outputs
    gauges = drafting.gauges
    assert least <= gauges.num_accepted_tokens / gauges.num_draft_tokens <= most


def reference_plans(path: Path, **sizes: int) -> Callable[[Limits], Plan]:
    """Makes plans of a tiny llama of these sizes."""
    program = load_model(write_tiny_llama(path, **sizes), lambda: None).program  # type: ignore
    return lambda limits: ReferenceBackend().compile(program, limits, lambda: None)


@pytest.mark.parametrize("make_draft_plan", [None, FakePlan])
def test_drafts_end_where_the_context_does(make_draft_plan: Any) -> None:
    engine = Engine(
        blocks=100,
        context=64,
        clock=lambda: 1.0,
        spare_logit_rows=32,
        draft_length=16,
        make_draft_plan=make_draft_plan,
    )
    submit = engine.submit(1, healthy_prompt(10, steps=60), max_tokens=1000)
    engine.run()
    assert engine.outputs[1, 0] == alone(submit, context=64)[0]
    assert engine.gauges.num_accepted_tokens > 0
    engine.assert_idle()


def test_a_draft_model_that_guesses_wrong_is_asked_less() -> None:
    class Wrong(FakePlan):
        def sample(self, *arguments: Any) -> Samples:
            samples = super().sample(*arguments)
            samples.ids[:] = (samples.ids + 1) % NAN_ID
            return samples

    clock = Clock()
    engine = Engine(
        blocks=100,
        context=600,
        max_rows=64,
        make_plan=clock.make_plan,
        clock=clock,
        spare_logit_rows=32,
        draft_length=0,
        make_draft_plan=Wrong,
    )
    submit = engine.submit(1, healthy_prompt(20, steps=500), max_tokens=500)
    engine.run()
    assert engine.outputs[1, 0] == alone(submit, context=600)[0]
    assert engine.gauges.num_accepted_tokens == 0
    assert engine.plan.num_forwards > 480  # type: ignore[attr-defined]
    assert clock.now_s - 1000 < 1.3 * 500 * 0.0044


def test_a_draft_model_sees_a_long_prompt_in_parts() -> None:
    widths: list[int] = []

    def make_noting(limits: Limits) -> FakePlan:
        plan = FakePlan(limits)
        forward = plan.forward

        def noting(batch: Batch) -> None:
            widths.append(len(batch.ids))
            forward(batch)

        plan.forward = noting  # type: ignore[method-assign]
        return plan

    engine = Engine(
        blocks=100,
        context=1000,
        max_rows=600,
        clock=lambda: 1.0,
        spare_logit_rows=8,
        draft_length=2,
        make_draft_plan=make_noting,
    )
    submit = engine.submit(1, healthy_prompt(600, steps=30), max_tokens=30)
    engine.run()
    assert widths[:3] == [256, 256, 91]  # 600 and the three tokens that came meanwhile
    assert engine.outputs[1, 0] == alone(submit, context=1000)[0]


def test_what_was_there_before_is_what_comes_next() -> None:
    lookup = Lookup()
    lookup.extend([1, 2, 3, 4, 5, 6])
    assert lookup.draft(4) == ([], 0)
    lookup.extend([1])
    assert lookup.draft(4) == ([], 0)
    lookup.extend([2, 3])
    assert lookup.draft(2) == ([4, 5], 3)
    assert lookup.draft(8) == ([4, 5, 6, 1, 2, 3, 4, 5], 3)
    lookup.extend([7, 1, 2, 3])
    assert lookup.draft(3) == ([7, 1, 2], 3)  # the last time counts
    assert lookup.num_tokens == 13


def test_where_more_tokens_are_the_same_counts_more_than_the_last_time() -> None:
    lookup = Lookup()
    lookup.extend([1, 2, 3, 4, 50, 9, 3, 4, 60, 1, 2, 3, 4])
    assert lookup.draft(1) == ([50], 4)
    lookup.extend([9, 9, 3, 4])
    assert lookup.draft(1) == ([9], 2)


def test_what_repeats_itself_is_the_same_for_as_long_as_is_counted() -> None:
    lookup = Lookup()
    lookup.extend([5] * 4)
    assert lookup.draft(3) == ([5, 5, 5], 3)
    lookup.extend([5] * 40)
    assert lookup.draft(3) == ([5, 5, 5], 8)


def test_longer_matches_have_higher_acceptance_rates() -> None:
    rates = AcceptanceRates()
    by_length = [rates.of(source_of_match(match_length)) for match_length in range(2, 30)]
    assert by_length == sorted(by_length) and by_length[0] < by_length[-1]


@pytest.mark.parametrize("source", DraftSource)
def test_acceptance_rates_follow_outcomes_and_drift_back(source: DraftSource) -> None:
    speculation = Speculation(StepCosts(), uses_prompt_lookup=False, draft_length=4)
    engine = engine_of(None)
    engine.submit(1, [1, 2, 3])
    sequence = engine.core._sequences[1][0]
    first = {each: sequence.acceptance_rates.of(each) for each in DraftSource}
    sequence.draft_sources = [source] * 4
    for _ in range(30):
        speculation.record(sequence, 4, 4)
    assert sequence.acceptance_rates.of(source) > 0.95
    for _ in range(60):
        speculation.record(sequence, 4, 0)
    assert sequence.acceptance_rates.of(source) < 0.05
    for _ in range(500):
        sequence.acceptance_rates.drift_to_initial(source)
    assert sequence.acceptance_rates.of(source) > 0.8 * first[source]
    others = [each for each in DraftSource if each != source]
    assert all(sequence.acceptance_rates.of(each) == first[each] for each in others)
