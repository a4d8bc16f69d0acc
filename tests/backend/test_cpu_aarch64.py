"""The tests of the CPU backend once more, on AArch64: compiled by ziglang, run by qemu-aarch64.

Marked compat: needs both, and the first compilation makes ziglang's C library (40 s).
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmsrv.backend.cpu import TIERS
from llmsrv.backend.source import cpu_features

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "pytest", "-p", "tests.support.aarch64", "-q", "-x")
TESTS = ("tests/backend/test_cpu.py", "tests/backend/test_cpu_sampling.py", "-k", "not refused")
# Without cosines, which are the C library's own.
DIGEST = """
import dataclasses, hashlib, os
import numpy as np
from llmsrv.backend import cpu
from llmsrv.config import default_cache_dir
from tests.support import aarch64
if os.environ["TIER"] in aarch64.CPUS:
    aarch64.install(os.environ["TIER"])
from tests.backend.test_cpu import LIMITS, VOCAB, RopeAndStore, llama, logits_of
from tests.support.plans import Run
tiers = tuple(tier for tier in cpu.TIERS if tier.name == os.environ["TIER"])
backend = cpu.CPUBackend(cpu.CPUOptions(default_cache_dir(), 2, tiers=tiers))
prompt = np.random.default_rng(5).integers(0, VOCAB, 285).tolist()
for type in "Q8_0", "Q4_1", "F16":
    program = llama(type, heads=6)
    operations = tuple(
        dataclasses.replace(op, frequencies=None) if isinstance(op, RopeAndStore) else op
        for op in program.operations
    )
    program = dataclasses.replace(program, operations=operations)
    plan = backend.compile(program, LIMITS, lambda: None)
    print(hashlib.sha256(logits_of(plan, Run(prompt, 5), 300)).hexdigest())
"""

pytestmark = [
    pytest.mark.compat,
    pytest.mark.skipif(not shutil.which("qemu-aarch64"), reason="needs qemu-aarch64 (qemu-user)"),
    pytest.mark.skipif(not importlib.util.find_spec("ziglang"), reason="needs ziglang"),
]


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """Where both tests of a tier find what is compiled."""
    return tmp_path_factory.mktemp("objects")


def run(command, tier, objects):
    environment = os.environ | {"TIER": tier, "OBJECTS": str(objects)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("tier", ["NEON", "NEON with I8MM"])
def test_the_kernels_of_aarch64_agree_with_the_reference(tier, objects):
    run([*COMMAND, *TESTS], tier, objects)


@pytest.mark.parametrize("tier", ["NEON", "NEON with I8MM"])
def test_logits_are_the_same_bits_as_with_avx2(tier, objects):
    if not any(tier.name == "AVX2" and tier.needs <= cpu_features() for tier in TIERS):
        pytest.skip("needs AVX2")
    command = [sys.executable, "-c", DIGEST]
    assert run(command, tier, objects) == run(command, "AVX2", objects)
