"""The self-test finds what is wrong with a backend, and nothing wrong with a right one."""

import dataclasses
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from llmsrv.backend.cpu.backend import CPUBackend
from llmsrv.backend.cpu.backend import CPUOptions
from llmsrv.backend.cuda.backend import CUDABackend
from llmsrv.backend.cuda.backend import CUDAOptions
from llmsrv.backend.reference.backend import ReferenceBackend
from llmsrv.config import default_cache_dir
from llmsrv.selftest import models
from llmsrv.selftest import run
from llmsrv.selftest import sampling
from llmsrv.selftest import speed
from llmsrv.selftest.cases import kernel_cases
from llmsrv.selftest.kernels import check_kernels
from llmsrv.selftest.models import check_model
from llmsrv.selftest.models import tiny_models
from llmsrv.selftest.sampling import sampling_differences
from llmsrv.selftest.speed import Size
from tests.support.cuda import install_stand_in
from tests.support.cuda import needs_emulation
from tests.support.server import ROOT

TINY = Size(256, 256, 4, 2, 32, 1000, 1, 1, 256, 4, copy_layers=1, prefill_rows=64)


@pytest.fixture(scope="module")
def backend():
    return CPUBackend(CPUOptions(default_cache_dir(), 2))


@pytest.fixture
def few(monkeypatch):
    """Few cases, models, and small sizes."""
    monkeypatch.setattr(run, "kernel_cases", lambda: itertools.islice(kernel_cases(), 3))
    monkeypatch.setattr(run, "tiny_models", lambda: itertools.islice(tiny_models(), 1))
    monkeypatch.setattr(run, "SIZES", {"cpu": TINY, "reference": TINY})
    monkeypatch.setattr(sampling, "VOCAB_SIZES", (61,))
    monkeypatch.setattr(speed, "MIN_S", 0.001)


class WrongBackend(ReferenceBackend):
    """The reference backend, whose plans `damage` changes."""

    def __init__(self, damage):
        super().__init__()
        self.damage = damage

    def compile(self, program, limits, tick):
        plan = super().compile(program, limits, tick)
        self.damage(plan)
        return plan


def off_by_two_percent(plan):
    read = plan.read
    plan.read = lambda name: read(name) * np.float32(1.02)


def takes_another_id(plan):
    sample = plan.sample

    def wrong_sample(*arguments):
        samples = sample(*arguments)
        return dataclasses.replace(samples, ids=samples.ids ^ 1)

    plan.sample = wrong_sample


def fails(plan):
    def forward(batch):
        raise RuntimeError("illegal memory access")

    plan.forward = forward


def some_cases():
    return itertools.islice(kernel_cases(), 0, None, 13)


def test_a_right_backend_has_no_faults(backend):
    assert all(outcome.is_right for outcome in check_kernels(backend, some_cases()))


@pytest.mark.parametrize("damage", [off_by_two_percent, fails])
def test_wrong_kernels_are_reported_each_by_name(damage):
    outcomes = list(check_kernels(WrongBackend(damage), itertools.islice(kernel_cases(), 20)))
    assert [outcome.name for outcome in outcomes][:2] == ["Embed", "Norm, activation, soft cap"]
    assert not any(outcome.is_right for outcome in outcomes)
    assert all(("illegal memory" in each.failure) == (damage is fails) for each in outcomes)


def test_samples_that_differ_from_the_contract_are_reported(backend, monkeypatch):
    monkeypatch.setattr(sampling, "VOCAB_SIZES", (61, 1000))
    assert list(sampling_differences(backend)) == []
    differences = list(sampling_differences(WrongBackend(takes_another_id)))
    assert "61 ids: round 0, row 0: ids" in differences[0]


def test_models_are_checked_through_the_engine(backend):
    model = next(tiny_models())
    assert check_model(backend, model).is_right
    assert check_model(WrongBackend(takes_another_id), model).disagreements > 0
    assert check_model(WrongBackend(off_by_two_percent), model).error > 0.02


def test_without_golden_models_made_ones_are_checked(backend, monkeypatch, tmp_path):
    monkeypatch.setattr(models, "GOLDEN", tmp_path / "none")
    monkeypatch.setattr(models, "MADE_TYPES", ("Q8_0",))
    [model] = tiny_models()
    assert [len(expected.ids) for expected in model.expected] == [24, 24, 24]
    assert check_model(backend, model).is_right


@pytest.mark.slow
def test_the_report_has_every_part(backend, few):
    lines = []
    report = run.run_selftest(backend, lines.append)
    assert report.num_faults == 0
    assert "no faults; " in lines[-1]
    results = json.loads(run.to_json(report))
    assert {"machine", "kernels", "models", "rates", "speed"} < results.keys()
    assert all(row["seconds"] > 0 for row in results["speed"])


def test_a_backend_that_fails_gets_a_report_to_the_end(few):
    lines = []
    report = run.run_selftest(WrongBackend(fails), lines.append)
    assert report.num_faults == 4  # kernels, sampling, the model and the measurements
    assert "4 FAULTS" in lines[-1]


@pytest.mark.slow
def test_the_command_prints_the_report():
    ended = subprocess.run(
        [sys.executable, "llmsrv.py", "selftest", "--backend", "cpu"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout
    assert "Attention, head_dim 128" in ended.stdout and "no faults" in ended.stdout


@pytest.mark.slow
@needs_emulation
def test_the_cuda_backend_has_no_faults_on_the_emulation(few, monkeypatch):
    install_stand_in()
    monkeypatch.setattr(run, "kernel_cases", lambda: itertools.islice(kernel_cases(), 0, None, 16))
    monkeypatch.setattr(run, "SIZES", {"cuda": TINY})
    monkeypatch.setattr(speed, "TYPES", ("BF16", "Q4_K"))
    backend = CUDABackend(CUDAOptions(default_cache_dir(), dtype="bfloat16", warms_up=False))
    lines = []
    report = run.run_selftest(backend, lines.append)
    assert report.num_faults == 0, lines
