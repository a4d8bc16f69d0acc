"""Runs the kernel tests again, with a page that faults right after each buffer."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.parameters import KERNEL_TESTS

ROOT = Path(__file__).parents[3]
COMMAND = (sys.executable, "-m", "pytest", "-p", "tests.support.guarded", "-q", "-x")
TESTS = (
    *KERNEL_TESTS,
    "tests/backend/cpu/test_golden.py",
    *("-k", "not default_model"),
)
OVER_THE_END = """
import ctypes, sys
import numpy as np
from tests.support.arena import Arena
end = Arena().array((7,), np.uint8).ctypes.data + 7
ctypes.memset(end, 0, int(sys.argv[1]))
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="uses Linux system calls"),
]


def test_the_kernels_neither_read_nor_write_beyond_their_buffers():
    done = subprocess.run([*COMMAND, *TESTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.mark.parametrize("num_bytes, returncode", [(0, 0), (1, -signal.SIGSEGV)])
def test_a_byte_beyond_a_buffer_faults(num_bytes, returncode):
    command = [sys.executable, "-c", OVER_THE_END, str(num_bytes)]
    assert subprocess.run(command, cwd=ROOT).returncode == returncode
