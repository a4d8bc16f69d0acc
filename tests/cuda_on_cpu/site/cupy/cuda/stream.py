"""Streams and events.

A stream's work normally runs at once.  With options.is_lazy it runs as late as it may: when the
host waits for it, or another stream that is run waits for it.  A missing wait then shows.

A graph does not keep the arrays alive that it uses.  So that memory freed too early is an error
instead of a crash, an operation names its allocations, and refers to them weakly in a graph.
"""

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cuda_on_cpu.options import EmulationError
from cuda_on_cpu.options import options

from cupy.cuda import runtime

__all__ = ["Event", "Stream", "get_current_stream", "get_elapsed_time"]

ERROR_CAPTURE_UNSUPPORTED = 900
ERROR_CAPTURE_INVALIDATED = 901


@dataclass
class Operation:
    """Work of a stream.

    name         for errors
    run          must not refer to arrays, but to memory
    allocations  objects that own the memory, or weak references to them in a graph
    """

    name: str
    run: Callable[[], None]
    allocations: tuple[Any, ...] = ()

    def in_graph(self) -> "Operation":
        owners = tuple(weakref.ref(owner) for owner in self.allocations)
        return Operation(self.name, self.run, owners)

    def run_checked(self) -> None:
        for owner in self.allocations:
            if isinstance(owner, weakref.ref) and owner() is None:
                raise EmulationError(f"{self.name} in a graph uses memory that has been freed")
        self.run()


class Stream:
    """null: the legacy default stream, which waits for blocking streams and they for it."""

    null: "Stream"

    def __init__(
        self,
        null: bool = False,
        non_blocking: bool = False,
        ptds: bool = False,
        priority: int | None = None,
    ) -> None:
        self.ptr = 0 if null else id(self)
        self.is_non_blocking = non_blocking
        self._queue: deque[Operation] = deque()
        self._num_enqueued = self._num_run = 0
        self._captured: list[Operation] | None = None
        self._previous: list[Stream] = []
        _streams.add(self)

    def _enqueue(self, operation: Operation) -> None:
        if self._captured is not None:
            self._captured.append(operation.in_graph())
            return
        if not options.is_lazy:
            operation.run_checked()
            return
        for other in self._implicitly_awaited():
            self._push(Operation("wait", other._until_now()))
        self._push(operation)

    def _push(self, operation: Operation) -> None:
        self._queue.append(operation)
        self._num_enqueued += 1

    def _implicitly_awaited(self) -> Iterable["Stream"]:
        if self is Stream.null:
            return [s for s in _streams if s is not self and not s.is_non_blocking and s._queue]
        return [] if self.is_non_blocking or not Stream.null._queue else [Stream.null]

    def _until_now(self) -> Callable[[], None]:
        """Runs what is in the queue now."""
        count = self._num_enqueued
        return lambda: self._run_until(count)

    def _run_until(self, count: int) -> None:
        while self._num_run < count and self._queue:
            self._num_run += 1
            self._queue.popleft().run_checked()

    def _refuse_in_capture(self, what: str) -> None:
        if any(stream._captured is not None for stream in (self, get_current_stream())):
            self._captured = get_current_stream()._captured = None
            raise runtime.CUDARuntimeError(
                ERROR_CAPTURE_UNSUPPORTED,
                f"cudaErrorStreamCaptureUnsupported: {what} while a stream is capturing",
            )

    def synchronize(self) -> None:
        self._refuse_in_capture("synchronize")
        self._run_until(self._num_enqueued)

    @property
    def done(self) -> bool:
        """Polling makes progress: one operation each time."""
        self._run_until(self._num_run + 1)
        return not self._queue

    def begin_capture(self, mode: int | None = None) -> None:
        if self is Stream.null:
            raise RuntimeError("cannot capture on the default (legacy) stream")
        self._captured = []

    def end_capture(self) -> Any:
        from cupy.cuda.graph import Graph

        captured, self._captured = self._captured, None
        if captured is None:
            raise runtime.CUDARuntimeError(
                ERROR_CAPTURE_INVALIDATED, "cudaErrorStreamCaptureInvalidated: capture has failed"
            )
        return Graph._captured(captured)

    def is_capturing(self) -> bool:
        return self._captured is not None

    def record(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: "Event") -> None:
        if event._until is not None:
            self._enqueue(Operation("wait_event", event._until))

    def launch_host_func(self, callback: Callable[[Any], None], arg: Any) -> None:
        self._enqueue(Operation("host function", lambda: callback(arg)))

    def use(self) -> "Stream":
        _current.stream = self
        return self

    def __enter__(self) -> "Stream":
        self._previous.append(get_current_stream())
        return self.use()

    def __exit__(self, *_: object) -> None:
        self._previous.pop().use()


class Event:
    def __init__(
        self, block: bool = False, disable_timing: bool = False, interprocess: bool = False
    ) -> None:
        self._until: Callable[[], None] | None = None
        self._stream: Stream | None = None
        self._count = 0
        self._time_s = 0.0

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or get_current_stream()
        stream._enqueue(Operation("event", self._mark))
        if stream.is_capturing():
            return
        self._stream = stream
        self._count = stream._num_enqueued
        self._until = stream._until_now()

    def _mark(self) -> None:
        self._time_s = time.perf_counter()

    def synchronize(self) -> None:
        get_current_stream()._refuse_in_capture("synchronize")
        if self._until is not None:
            self._until()

    @property
    def done(self) -> bool:
        if self._stream is None or self._stream._num_run >= self._count:
            return True
        self._stream._run_until(self._stream._num_run + 1)
        return self._stream._num_run >= self._count


def get_elapsed_time(start_event: Event, end_event: Event) -> float:
    """Milliseconds."""
    return (end_event._time_s - start_event._time_s) * 1e3


_streams: "weakref.WeakSet[Stream]" = weakref.WeakSet()
_current = threading.local()
Stream.null = Stream(null=True)


def get_current_stream(device_id: int = -1) -> Stream:
    return getattr(_current, "stream", Stream.null)


def synchronize_all() -> None:
    for stream in list(_streams):
        stream.synchronize()
