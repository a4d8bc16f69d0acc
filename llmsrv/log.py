"""Logging that never blocks the event loop and never lets a client write to the terminal.

Records go through a bounded queue to a thread.  While the sink is blocked, further records are
dropped and counted.  Control characters in messages are escaped.
"""

import logging
import logging.handlers
import queue
import sys
from typing import Any

QUEUE_LENGTH = 1000


class _DroppingHandler(logging.handlers.QueueHandler):
    """Counts the records that it has to drop, and adds the number to the next one it can queue."""

    dropped = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record  # the queue stays in this process, so nothing is pickled

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            if self.dropped:
                record.msg = f"{record.msg} ({self.dropped} lines dropped before this one)"
            self.queue.put_nowait(record)
            self.dropped = 0
        except queue.Full:
            self.dropped += 1


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


def set_up(level: str) -> logging.handlers.QueueListener:
    """Starts logging to stderr at `level`, until tear_down()."""
    sink = logging.StreamHandler(sys.stderr)
    sink.setFormatter(_EscapingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    records: queue.Queue[logging.LogRecord] = queue.Queue(QUEUE_LENGTH)
    root = logging.getLogger("llmsrv")
    root.setLevel(level.upper())
    root.handlers = [_DroppingHandler(records)]
    root.propagate = False
    listener = logging.handlers.QueueListener(records, sink)
    listener.start()
    return listener


def tear_down(listener: logging.handlers.QueueListener) -> None:
    """Writes the records that are left, and undoes set_up()."""
    listener.stop()
    root = logging.getLogger("llmsrv")
    root.setLevel(logging.NOTSET)
    root.handlers = []
    root.propagate = True
