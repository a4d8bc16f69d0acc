"""The CPU backend against transformers in float32 (tests/data/golden), teacher-forced: the default
model, Gemma 3, and tiny models of every architecture."""

import json
from pathlib import Path

import pytest

from llmsrv.backend.base import Limits
from llmsrv.backend.cpu.backend import CPUBackend
from llmsrv.backend.cpu.backend import CPUOptions
from llmsrv.backend.cpu.tiers import TIERS
from llmsrv.config import default_cache_dir
from llmsrv.model.load import load_model
from tests.support.golden import steps

GOLDEN = Path(__file__).parents[2] / "data/golden"
SMOLLM2 = GOLDEN / "smollm2-135m-instruct-q4_1.json"
GEMMA3 = GOLDEN / "gemma-3-270m-q4_k_m.json"
TINY = [path.name for path in sorted((GOLDEN / "tiny").iterdir())]
LIMITS = Limits(max_rows=3072, max_logit_rows=1024, max_slots=2, num_blocks=200)


def measured(model, golden, bits):
    """Every step of all cases."""
    tiers = tuple(tier for tier in TIERS if bits == 16 or not tier.always_16_bits)
    backend = CPUBackend(CPUOptions(default_cache_dir(), activation_bits=bits, tiers=tiers))
    program = load_model(model, lambda: None).program
    plan = backend.compile(program, LIMITS, lambda: None)
    cases = json.loads(golden.read_text())["cases"]
    return [step for case in cases for step in steps(plan, program, case)]


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def check(results, agreement, error):
    assert mean(step.agrees for step in results) >= agreement
    assert mean(step.error for step in results) <= error


def check_exact(results):
    check(results, agreement=0.99, error=0.005)
    assert all(step.gap < 0.02 for step in results if not step.agrees)


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_of_every_architecture_agree_with_float32(name):
    check_exact(measured(GOLDEN / "tiny" / name, GOLDEN / "tiny" / name / "golden.json", 16))


@pytest.mark.slow
def test_the_default_model_agrees_with_float32(smollm2):
    check_exact(measured(smollm2, SMOLLM2, 16))


@pytest.mark.slow
def test_gemma_3_agrees_with_float32(gemma3):
    check_exact(measured(gemma3, GEMMA3, 16))


@pytest.mark.slow
def test_eight_bits_are_no_worse_than_in_llama_cpp(smollm2, gemma3):
    check(measured(smollm2, SMOLLM2, 8), agreement=0.959, error=0.035)
    check(measured(gemma3, GEMMA3, 8), agreement=0.959, error=0.134)
