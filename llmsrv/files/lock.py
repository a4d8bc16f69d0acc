"""Lets one process at a time write to a cache folder."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from llmsrv.files.progress import try_write


@contextmanager
def locked(folder: Path, progress: TextIO) -> Iterator[None]:
    """Waits for the lock.  The system releases it when its holder ends, even if killed."""
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            try_write(progress, "another process is fetching the model; waiting for it\n")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
