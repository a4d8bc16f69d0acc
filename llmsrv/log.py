"""Logging that never blocks the loop and never lets a client write into the terminal.

Records go through a bounded queue to a thread; when the sink is blocked they are dropped and
counted.  Control characters in messages are escaped.
"""

import logging
import logging.handlers
import queue
import sys
from typing import Any

QUEUE_LENGTH = 1000


class _DroppingHandler(logging.handlers.QueueHandler):
    """Counts what it cannot hand over, and says so with the next record that it can."""

    dropped = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record  # the queue stays in this process, so nothing needs to be pickled

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            if self.dropped:
                record.msg = f"{record.msg} ({self.dropped} lines dropped before this one)"
            self.queue.put_nowait(record)
            self.dropped = 0
        except queue.Full:
            self.dropped += 1


class _EscapingFormatter(logging.Formatter):
    """What a client sent can neither break lines nor colour them; tracebacks keep their lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = _escaped(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        return "\n".join(_escaped(line) for line in super().formatException(ei).split("\n"))


def _escaped(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def set_up(level: str) -> logging.handlers.QueueListener:
    """Starts logging to stderr at `level`; stop() of the listener writes what is left."""
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
