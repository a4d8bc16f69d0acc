"""Drafts of a small model: the tokens of plain decoding, in fewer steps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmsrv.backend.base import Batch
from llmsrv.backend.base import Limits
from llmsrv.backend.base import Plan
from llmsrv.backend.reference.backend import ReferenceBackend
from llmsrv.backend.sampling.samples import Samples
from llmsrv.engine.messages import Sampling
from llmsrv.model.load import load_model
from tests.support.cores import alone
from tests.support.cores import Engine
from tests.support.cores import GREEDY
from tests.support.cores import healthy_prompt
from tests.support.fake_plan import FakePlan
from tests.support.fake_plan import NAN_ID
from tests.support.gguf_writer import write_tiny_llama
from tests.support.timed_engine import Clock


@pytest.mark.parametrize("draft_length", [1, 4, 0])
def test_a_draft_model_changes_no_output(draft_length: int) -> None:
    """The draft model equals the target model, so it must draft nearly every token correctly."""
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
    """least, most: bounds of the acceptance rate."""
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
    """Compiles a tiny llama of these sizes."""
    program = load_model(write_tiny_llama(path, **sizes), lambda: None).program  # type: ignore
    return lambda limits: ReferenceBackend().compile(program, limits, lambda: None)


def test_a_draft_model_that_is_often_wrong_is_used_less() -> None:
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


def test_a_draft_model_computes_a_long_prompt_in_parts() -> None:
    widths: list[int] = []

    def make_recording(limits: Limits) -> FakePlan:
        plan = FakePlan(limits)
        forward = plan.forward

        def recording(batch: Batch) -> None:
            widths.append(len(batch.ids))
            forward(batch)

        plan.forward = recording  # type: ignore[method-assign]
        return plan

    engine = Engine(
        blocks=100,
        context=1000,
        max_rows=600,
        clock=lambda: 1.0,
        spare_logit_rows=8,
        draft_length=2,
        make_draft_plan=make_recording,
    )
    submit = engine.submit(1, healthy_prompt(600, steps=30), max_tokens=30)
    engine.run()
    assert widths[:3] == [256, 256, 91]  # 600 and the three tokens sampled meanwhile
    assert engine.outputs[1, 0] == alone(submit, context=1000)[0]
