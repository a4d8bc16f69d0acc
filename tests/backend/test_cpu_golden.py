"""The CPU backend on the default model, against transformers in float32 (tests/data/golden)."""

import json
from pathlib import Path

import pytest

from llmsrv.backend.base import Limits
from llmsrv.backend.cpu import CPUBackend
from llmsrv.backend.cpu import CPUOptions
from llmsrv.config import default_cache_dir
from llmsrv.model.load import load_model
from tests.support.golden import steps

GOLDEN = Path(__file__).parents[1] / "data/golden/smollm2-135m-instruct-q4_1.json"
LIMITS = Limits(max_rows=2048, max_logit_rows=1024, max_slots=2, num_blocks=130)


def measured(model, bits):
    """Every step of all cases."""
    backend = CPUBackend(CPUOptions(default_cache_dir(), activation_bits=bits))
    program = load_model(model, lambda: None).program
    plan = backend.compile(program, LIMITS, lambda: None)
    cases = json.loads(GOLDEN.read_text())["cases"]
    return [step for case in cases for step in steps(plan, case, program.vocab_size)]


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def test_sixteen_bits_agree_with_float32(smollm2):
    results = measured(smollm2, 16)
    assert len(results) > 300
    assert mean(step.agrees for step in results) >= 0.99
    assert mean(step.error for step in results) <= 0.005
    assert all(step.gap < 0.02 for step in results if not step.agrees)


@pytest.mark.slow
def test_eight_bits_are_no_worse_than_those_of_llama_cpp(smollm2):
    results = measured(smollm2, 8)
    assert mean(step.agrees for step in results) >= 0.959
    assert mean(step.error for step in results) <= 0.035
