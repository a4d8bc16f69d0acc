"""A counter in memory that the server process shares with the engine process.

multiprocessing's own shared values are files in /dev/shm, which may be read-only or full.
"""

import ctypes
import mmap
import os
import tempfile
from multiprocessing import reduction
from typing import Any
from typing import BinaryIO
from typing import cast


class Heartbeat:
    """count  grows as long as the engine makes progress

    It can be an argument of a process that is being started.
    """

    def __init__(self, file: BinaryIO | None = None) -> None:
        """file: that of the same heartbeat in the other process; None makes a new one.

        Raises OSError if the system has no file or memory left.
        """
        self._file = file or _memory_file()
        self.count = ctypes.c_ulonglong.from_buffer(mmap.mmap(self._file.fileno(), _SIZE))

    def __reduce__(self) -> Any:
        return _attach, (reduction.DupFd(self._file.fileno()),)


_SIZE = ctypes.sizeof(ctypes.c_ulonglong)


def _memory_file() -> BinaryIO:
    if hasattr(os, "memfd_create"):
        file = cast(BinaryIO, os.fdopen(os.memfd_create("llmsrv-heartbeat"), "r+b"))
    else:
        file = cast(BinaryIO, tempfile.TemporaryFile())
    file.truncate(_SIZE)
    return file


def _attach(descriptor: Any) -> Heartbeat:
    return Heartbeat(cast(BinaryIO, os.fdopen(descriptor.detach(), "r+b")))
