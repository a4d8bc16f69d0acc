"""Deadlines that are cheap to move, and a rate limit for log lines."""

import asyncio
from collections.abc import Callable
from math import inf
from time import monotonic


class Deadline:
    """Calls back when the deadline passes.

    A request moves its connection's deadline several times and hardly ever reaches it.  So moving
    it later only records the time.  There is at most one timer; if it fires early, it is rearmed.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        self._loop = loop
        self._callback = callback
        self._at = inf
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = inf

    def set(self, delay_s: float) -> None:
        self._at = self._loop.time() + delay_s
        if self._at < self._timer_at:
            self._arm()

    def clear(self) -> None:
        self._at = inf

    def close(self) -> None:
        self._at = inf
        if self._timer:
            self._timer.cancel()

    def _arm(self) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer_at = self._at
        self._timer = self._loop.call_at(self._at, self._fire)

    def _fire(self) -> None:
        self._timer = None
        self._timer_at = inf
        if self._at == inf:
            return
        if self._loop.time() < self._at:
            self._arm()
            return
        self._at = inf
        self._callback()


class LogRateLimit:
    """Allows one line per second, so that hostile clients cannot flood the log."""

    def __init__(self) -> None:
        self._next_at = 0.0

    def allows_line(self) -> bool:
        now = monotonic()
        if now < self._next_at:
            return False
        self._next_at = now + 1.0
        return True
