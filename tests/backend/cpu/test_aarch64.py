"""Runs the kernel tests again on AArch64: compiled by ziglang, run by qemu-aarch64.

Marked compat: needs both, and the first compilation builds ziglang's C library (40 s).
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.parameters import KERNEL_TESTS

ROOT = Path(__file__).parents[3]
COMMAND = (sys.executable, "-m", "pytest", "-p", "tests.support.aarch64", "-q", "-x", *KERNEL_TESTS)

pytestmark = [
    pytest.mark.compat,
    pytest.mark.skipif(not shutil.which("qemu-aarch64"), reason="needs qemu-aarch64 (qemu-user)"),
    pytest.mark.skipif(not importlib.util.find_spec("ziglang"), reason="needs ziglang"),
]


@pytest.mark.parametrize("tier", ["NEON", "NEON with I8MM"])
def test_the_kernels_of_aarch64_agree_with_the_reference(tier, tmp_path):
    environment = os.environ | {"TIER": tier, "OBJECTS": str(tmp_path)}
    done = subprocess.run(COMMAND, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
