"""Deadlines that are cheap to move, and cheap to have by the thousand."""

import asyncio
import itertools
from collections.abc import Callable
from heapq import heappop
from heapq import heappush
from math import inf


class Timer:
    """Fires the deadlines of one owner with a single timer of the event loop.

    A timer of the loop for each deadline would take 500 bytes.
    """

    def __init__(self) -> None:
        self._numbers = itertools.count()  # so that the queue never compares deadlines
        self._queue: list[tuple[float, int, Deadline]] = []
        self._handle: asyncio.TimerHandle | None = None
        self._handle_at = inf

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def add(self, at: float, deadline: "Deadline") -> None:
        heappush(self._queue, (at, next(self._numbers), deadline))
        self._set_handle()

    def _set_handle(self) -> None:
        if not self._queue or self._queue[0][0] >= self._handle_at:
            return
        if self._handle is not None:
            self._handle.cancel()
        self._handle_at = self._queue[0][0]
        self._handle = asyncio.get_running_loop().call_at(self._handle_at, self._fire)

    def _fire(self) -> None:
        self._handle, self._handle_at = None, inf
        now = self.now()
        try:
            while self._queue and self._queue[0][0] <= now:
                at, _, deadline = heappop(self._queue)
                deadline.reach(at)
        finally:
            self._set_handle()


class Deadline:
    """Calls back when the deadline passes.

    A request moves its connection's deadline several times and hardly ever reaches it.  So moving
    it later only records the time: it is queued again when the earlier time is reached.
    """

    __slots__ = ("_timer", "_callback", "_at", "_queued_at")

    def __init__(self, timer: Timer, callback: Callable[[], object]) -> None:
        self._timer = timer
        self._callback: Callable[[], object] | None = callback
        self._at = inf
        self._queued_at = inf

    @property
    def is_set(self) -> bool:
        return self._at != inf

    def set(self, delay_s: float) -> None:
        self._at = self._timer.now() + delay_s
        if self._at < self._queued_at:
            self._queue()

    def clear(self) -> None:
        self._at = inf

    def close(self) -> None:
        """Clears it and releases the callback, since the timer may still refer to this."""
        self._at = inf
        self._callback = None

    def reach(self, at: float) -> None:
        """Only the timer calls this, at the time that it was queued for."""
        if at != self._queued_at:
            return  # queued again since, for an earlier time
        self._queued_at = inf
        if self._at == inf:
            return
        if self._timer.now() < self._at:
            self._queue()
            return
        self._at = inf
        if self._callback is not None:
            self._callback()

    def _queue(self) -> None:
        self._queued_at = self._at
        self._timer.add(self._at, self)
