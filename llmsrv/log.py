"""Output that never blocks the event loop, and logs in which no client can write to the terminal.

A pipe whose reader has stopped fills up, and then every write to it blocks.  So text goes through a
bounded queue to a thread.  While the stream is blocked, further lines are dropped and counted.
Control characters in log messages are escaped.
"""

import atexit
import io
import logging
import os
import queue
import select
import sys
import threading
from collections.abc import Callable
from typing import Any
from typing import TextIO

QUEUE_LENGTH = 1000
FINISH_S = 0.5  # to write what is left when the process ends


class Output(io.TextIOBase):
    """A text stream in place of another one, whose write() never waits."""

    def __init__(self, stream: TextIO, length: int = QUEUE_LENGTH) -> None:
        """length: how many writes can wait; more are dropped."""
        self._stream = stream
        self._encoding = stream.encoding or "utf-8"
        self._fd = _file_descriptor(stream)
        self._waiting: queue.Queue[str | None] = queue.Queue(length)
        self.num_dropped = 0  # lines
        self._num_reported = 0  # of these, in the stream itself
        self._thread = threading.Thread(target=self._run, name="llmsrv-output", daemon=True)
        self._thread.start()

    def write(self, text: str) -> int:
        num_new = self.num_dropped - self._num_reported
        note = f"({num_new} lines dropped)\n" if num_new else ""
        try:
            self._waiting.put_nowait(note + text)
            self._num_reported = self.num_dropped
        except queue.Full:
            self.num_dropped += text.count("\n")
        return len(text)

    def flush(self) -> None:
        """Does nothing: waiting for the stream is what this class avoids."""

    def isatty(self) -> bool:
        return self._stream.isatty()

    @property
    def num_waiting(self) -> int:
        """Writes that the thread has not begun."""
        return self._waiting.qsize()

    def finish(self) -> None:
        """Waits until everything is written, or for FINISH_S.  Later writes are lost."""
        try:
            self._waiting.put(None, timeout=FINISH_S / 2)
        except queue.Full:
            return
        self._thread.join(FINISH_S / 2)

    def _run(self) -> None:
        while (text := self._waiting.get()) is not None:
            try:
                self._write(text)
            except (OSError, ValueError):
                pass  # the reader is gone, or the stream is closed; the server still serves

    def _write(self, text: str) -> None:
        if self._fd is None:
            self._stream.write(text)
            self._stream.flush()
            return
        # Not through the stream: a thread that is blocked in it would hold its lock, and Python
        # would wait for that lock when the process ends.
        data = text.encode(self._encoding, "backslashreplace")
        while data:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:  # another process has made the shared pipe non-blocking
                select.select([], [self._fd], [])


def _file_descriptor(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except OSError:  # a stream in memory
        return None


def guard_output() -> None:
    """Makes sys.stdout and sys.stderr streams that never block, until the process ends."""
    for name in ("stdout", "stderr"):
        # Python has None for a stream that was closed when the process started.
        output = Output(getattr(sys, name) or open(os.devnull, "w"))
        setattr(sys, name, output)
        atexit.register(output.finish)


def num_dropped_lines() -> int:
    """Lines that guarded streams have dropped."""
    streams = (sys.stdout, sys.stderr)
    return sum(stream.num_dropped for stream in streams if isinstance(stream, Output))


class _EscapingFormatter(logging.Formatter):
    """Keeps clients from breaking or colouring log lines; tracebacks keep their line breaks."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = _escaped(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        return "\n".join(_escaped(line) for line in super().formatException(ei).split("\n"))


def _escaped(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def is_set_up() -> bool:
    """Whether our log messages have a handler, be it ours or the host program's."""
    return logging.getLogger("llmsrv").hasHandlers()


def set_up(level: str) -> Callable[[], None]:
    """Starts logging to stderr at `level`; returns a function that undoes this."""
    output = sys.stderr if isinstance(sys.stderr, Output) else Output(sys.stderr)
    sink = logging.StreamHandler(output)
    sink.setFormatter(_EscapingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger("llmsrv")
    root.setLevel(level.upper())
    root.handlers = [sink]
    root.propagate = False

    def tear_down() -> None:
        root.setLevel(logging.NOTSET)
        root.handlers = []
        root.propagate = True
        if output is not sys.stderr:
            output.finish()

    return tear_down
