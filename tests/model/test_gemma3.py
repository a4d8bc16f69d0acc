"""Gemma 3 270M, quantized as Q4_K_M, against transformers in float32 (tests/data/golden)."""

import json
from pathlib import Path

import pytest

from llmsrv.backend.base import Limits
from llmsrv.backend.reference.backend import ReferenceBackend
from llmsrv.backend.sampling.table import SamplingParameters
from llmsrv.model.load import load_model
from tests.support.plans import Run
from tests.support.plans import generate

GOLDEN = Path(__file__).parents[1] / "data/golden/gemma-3-270m-q4_k_m.json"
CASES = json.loads(GOLDEN.read_text())["cases"]
TOLERANCE = 2e-3  # of a log-probability


@pytest.fixture(scope="module")
def plan(gemma3):
    limits = Limits(max_rows=2048, max_logit_rows=8, max_slots=8, num_blocks=256)
    program = load_model(gemma3, lambda: None).program
    return ReferenceBackend().compile(program, limits, lambda: None)


@pytest.mark.slow
def test_cases_together_give_the_golden_tokens_and_log_probabilities(plan):
    parameters = SamplingParameters(temperature=0, num_logprobs=12)
    runs = [Run(case["prompt_ids"], len(case["greedy_ids"]), parameters) for case in CASES]
    generate(plan, runs, chunk=512)
    for run, case in zip(runs, CASES, strict=True):
        assert run.ids == case["greedy_ids"]
        for ours, golden in zip(run.alternatives, case["top10_logprobs"], strict=True):
            theirs = dict(golden)
            # We request twelve, so that the tenth and the next ones may swap places.
            assert {id: ours.get(id) for id in theirs} == pytest.approx(theirs, abs=TOLERANCE)
