"""A temporary folder for compilers.  Nothing is left of either when this process is killed."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import suppress
from pathlib import Path

# The guard's pipe is closed when the process that started it has ended, however it ended.  Then a
# fork of the guard leaves the group, kills it, and waits until nobody can write to the folder.
GUARD = """
import os, shutil, signal, sys, time
sys.stdin.buffer.read()
group = os.getpgrp()
if os.fork():
    signal.pause()
os.setsid()
for _ in range(100):
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        break
    time.sleep(0.01)
shutil.rmtree(sys.argv[1], ignore_errors=True)
"""


@contextmanager
def build_folder() -> Iterator[tuple[Path, int]]:
    """A new folder, and the process group in which to start compilers; both end with the block.

    A compiler must keep its own temporary files in the folder ($TMPDIR).  Raises OSError if there
    is no room for a folder or a process.
    """
    with tempfile.TemporaryDirectory(prefix="llmsrv-") as folder:
        with subprocess.Popen(
            (sys.executable, "-I", "-S", "-c", GUARD, folder),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,
        ) as guard:
            try:
                yield Path(folder), guard.pid
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(guard.pid, signal.SIGKILL)
