"""The tests of the CPU backend once more, each buffer ending where a page begins that faults."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
COMMAND = (sys.executable, "-m", "pytest", "-p", "tests.support.guarded", "-q", "-x")
TESTS = (
    *(f"tests/backend/cpu/test_{name}.py" for name in ("backend", "sampling", "golden")),
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
    pytest.mark.skipif(sys.platform != "linux", reason="places memory by Linux' calls"),
]


def test_the_kernels_neither_read_nor_write_beyond_their_buffers():
    done = subprocess.run([*COMMAND, *TESTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.mark.parametrize("num_bytes, returncode", [(0, 0), (1, -signal.SIGSEGV)])
def test_a_byte_beyond_a_buffer_faults(num_bytes, returncode):
    command = [sys.executable, "-c", OVER_THE_END, str(num_bytes)]
    assert subprocess.run(command, cwd=ROOT).returncode == returncode
