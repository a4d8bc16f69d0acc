"""Flags to wait for, and a rate limit for log lines."""

import asyncio
from time import monotonic


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
