"""Deadlines that are cheap to move, flags to wait for, and a rate limit for log lines."""

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


class Flag:
    """As asyncio.Event, which takes 750 bytes: most flags of most connections have no waiter."""

    __slots__ = ("_is_set", "_waiters")

    def __init__(self, is_set: bool = False) -> None:
        self._is_set = is_set
        self._waiters: tuple[asyncio.Future[None], ...] = ()

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        waiters, self._waiters = self._waiters, ()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def clear(self) -> None:
        self._is_set = False

    async def wait(self) -> None:
        if self._is_set:
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiters = (*self._waiters, waiter)
        try:
            await waiter
        finally:
            self._waiters = tuple(other for other in self._waiters if other is not waiter)


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
