"""The default model against transformers in float32 (tests/data/golden)."""

import json
from pathlib import Path

import pytest

from llmsrv.backend.base import Limits
from llmsrv.backend.reference.backend import ReferenceBackend
from llmsrv.backend.sampling.table import SamplingParameters
from llmsrv.model.load import load_model
from tests.support.plans import Run
from tests.support.plans import generate

GOLDEN = Path(__file__).parents[1] / "data/golden/smollm2-135m-instruct-q4_1.json"
CASES = json.loads(GOLDEN.read_text())["cases"]
TOLERANCE = 2e-3  # of a log-probability

pytestmark = pytest.mark.slow  # test_golden_tiny.py is the quick version


@pytest.fixture(scope="module")
def plan(smollm2):
    limits = Limits(max_rows=2048, max_logit_rows=16, max_slots=16, num_blocks=128)
    program = load_model(smollm2, lambda: None).program
    return ReferenceBackend().compile(program, limits, lambda: None)


def make_run(case):
    parameters = SamplingParameters(temperature=0, num_logprobs=11)
    return Run(case["prompt_ids"], len(case["greedy_ids"]), parameters)


def check(run, case):
    assert run.ids == case["greedy_ids"]
    for step, golden in enumerate(case["top10_logprobs"]):
        theirs, ours = dict(golden), run.alternatives[step]
        assert run.logprobs[step] == pytest.approx(theirs[run.ids[step]], abs=TOLERANCE)
        # We request eleven, so that the tenth and the eleventh may swap places.
        assert {id: ours.get(id) for id in theirs} == pytest.approx(theirs, abs=TOLERANCE)


@pytest.mark.parametrize("index, chunk", [(0, 1), (1, 3), (8, 512)])  # the shortest, the longest
def test_a_case_alone_gives_the_golden_tokens_and_log_probabilities(plan, index, chunk):
    run = make_run(CASES[index])
    generate(plan, [run], chunk, seed=chunk)
    check(run, CASES[index])


def test_all_cases_together_in_chunks_give_the_golden_tokens_and_log_probabilities(plan):
    runs = [make_run(case) for case in CASES]
    generate(plan, runs, chunk=16, seed=1)
    for run, case in zip(runs, CASES):
        check(run, case)
