"""Opens a file in a fresh process, to measure its own peak memory."""

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
# On Linux ru_maxrss includes the parent's memory at the time of the fork; VmHWM does not.
SCRIPT = """
import resource, sys, time
from importlib import import_module
from pathlib import Path
def peak_bytes():
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
open_file = getattr(import_module(sys.argv[1]), sys.argv[2])
before, start = peak_bytes(), time.process_time()
try: file = open_file(Path(sys.argv[3]))
except Exception as error: print(type(error).__name__, file=sys.stderr)
print(peak_bytes() - before, time.process_time() - start)
"""


class Opened(NamedTuple):
    """What opening the file cost on top of Python itself; error: the exception's name, or ""."""

    peak_bytes: int
    seconds: float
    error: str


def open_in_a_fresh_process(module: str, function: str, path: Path) -> Opened:
    """Calls module.function(path)."""
    command = [sys.executable, "-c", SCRIPT, module, function, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    peak_bytes, seconds = done.stdout.split()
    return Opened(int(peak_bytes), float(seconds), done.stderr.strip())
