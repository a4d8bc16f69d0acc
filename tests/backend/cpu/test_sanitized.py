"""Runs the kernel tests again, with kernels built with AddressSanitizer and UBSan."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.parameters import KERNEL_TESTS

ROOT = Path(__file__).parents[3]
COMMAND = (sys.executable, "-m", "pytest", "-p", "tests.support.sanitized", "-q", "-x")
TESTS = (
    *KERNEL_TESTS,
    "tests/backend/cpu/test_golden.py",
    *("-k", "not default_model"),
)


def runtime(name):
    """The sanitizer's library, which must be loaded first; None if gcc lacks it."""
    path = subprocess.run(
        ["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return path if Path(path).is_absolute() else None


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")
def test_the_kernels_run_clean_under_the_sanitizers():
    libraries = [runtime("libasan.so"), runtime("libubsan.so")]
    if None in libraries:
        pytest.skip("gcc has no sanitizers here")
    environment = os.environ | {
        "CC": "gcc",
        "LD_PRELOAD": " ".join(filter(None, libraries)),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
    }
    done = subprocess.run(
        [*COMMAND, *TESTS], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
