"""Speculative decoding: the tokens of plain decoding, in fewer steps."""

from typing import Any

import numpy as np
import pytest

from llmsrv.engine.acceptance import AcceptanceRates
from llmsrv.engine.acceptance import DraftSource
from llmsrv.engine.acceptance import source_of_match
from llmsrv.engine.messages import Sampling
from llmsrv.engine.speculation import Speculation
from llmsrv.engine.step_costs import StepCosts
from tests.support.cores import alone
from tests.support.cores import Engine
from tests.support.cores import GREEDY
from tests.support.cores import healthy_prompt
from tests.support.fake_plan import FakePlan
from tests.support.fake_plan import VOCAB_SIZE
from tests.support.timed_engine import Clock
from tests.support.timed_engine import gaps_of


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


def test_repetitive_text_takes_a_fraction_of_the_steps() -> None:
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


def test_every_token_of_a_step_has_log_probabilities() -> None:
    engine = engine_of(4)
    sampling = Sampling(0, 0.0, num_logprobs=2)
    engine.submit(1, healthy_prompt(20, steps=60), max_tokens=60, sampling=sampling)
    lengths = set()
    while engine.core.has_work:
        for tokens in engine.step().tokens:
            assert len(tokens.ids) == len(tokens.logprobs) == len(tokens.alternatives)
            lengths.add(len(tokens.ids))
    assert {1, 5} <= lengths


def test_an_end_id_within_a_draft_ends_the_choice_there() -> None:
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
def test_drafts_never_exceed_max_tokens(max_tokens: int) -> None:
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


class ChoosyGrammar:
    """A grammar that forbids one id within drafts, and forces the next tokens once."""

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


def test_a_draft_is_cut_at_the_first_token_that_the_grammar_forbids() -> None:
    engine = engine_of(8)
    submit = engine.submit(1, [1, 2, 3, 4, 5] * 4, max_tokens=30)
    drafted = []
    forward = engine.plan.forward

    def recording(batch):  # type: ignore[no-untyped-def]
        drafted.append(batch.ids[1:].tolist())
        forward(batch)

    engine.step()
    refused = engine.outputs[1, 0][0]
    engine.core._sequences[1][0].grammar = ChoosyGrammar(refused, [])  # type: ignore[assignment]
    engine.plan.forward = recording  # type: ignore[method-assign]
    engine.run()
    assert engine.outputs[1, 0] == alone(submit, context=1000)[0]
    assert any(drafted) and not any(refused in draft for draft in drafted)


def test_forced_tokens_are_drafted_even_without_prompt_lookup() -> None:
    engine = engine_of(None)
    engine.core._costs.record(1, 0.01)
    engine.core._costs.record(16, 0.011)
    submit = engine.submit(1, healthy_prompt(20, steps=30), max_tokens=30)
    expected = alone(submit, context=1000)[0]
    engine.step()
    grammar = ChoosyGrammar(-1, expected[1:6])
    engine.core._sequences[1][0].grammar = grammar  # type: ignore[assignment]
    assert engine.step().tokens[0].ids == expected[1:7]
    engine.run()
    assert engine.outputs[1, 0] == expected


@pytest.mark.parametrize("row_s, pays", [(0.0001, True), (0.02, False)])
def test_drafts_are_made_if_they_pay(row_s: float, pays: bool) -> None:
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


def test_there_are_no_drafts_while_a_prompt_is_computed() -> None:
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
    assert max(gaps) < 0.055
    assert len(engine.outputs[0, 0]) - num_tokens == 1 + len(gaps)
    assert max(len(engine.step().tokens[0].ids) for _ in range(20)) > 6


def test_the_most_likely_tokens_are_kept_if_not_all_fit() -> None:
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


@pytest.mark.parametrize("make_draft_plan", [None, FakePlan])
def test_drafts_end_with_the_context(make_draft_plan: Any) -> None:
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
