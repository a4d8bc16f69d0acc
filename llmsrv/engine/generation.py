"""The events of one request to the engine.  client.py makes it and puts the events in."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

from llmsrv.engine.crashes import hash_of
from llmsrv.engine.messages import Finished
from llmsrv.engine.messages import Submit
from llmsrv.engine.messages import Tokens
from llmsrv.errors import ApiError
from llmsrv.timing import Deadline
from llmsrv.timing import Timer

NO_RETRY = {"x-should-retry": "false"}


class Generation:
    """The events of one request, in order, for one task to await.

    Use it in `async with`, or exhaust it, or abort it; otherwise the request keeps running.  Events
    wait here until they are taken; the engine never waits for that.
    """

    def __init__(self, submit: Submit, abort: Callable[[int, int | None], None]) -> None:
        # Thousands may wait, so nothing is kept of the Submit that is not asked for later.
        self.request = submit.request
        self.hash = hash_of(submit)
        self.tenant = submit.tenant
        self.num_prompt_tokens = len(submit.prompt_ids)
        self.max_tokens = submit.max_tokens
        self.num_cached_tokens = 0  # of the prompt; set when the first choice is admitted
        self.admitted_s: float | None = None  # when the first choice was admitted
        self.received_s = 0.0  # when the last event that was taken arrived
        self._abort = abort
        # None until the first: an empty deque takes 750 bytes.
        self._events: deque[tuple[Tokens | Finished, float]] | None = None
        self.unfinished = tuple(range(submit.n))  # choices; empty when the request has ended
        self._error: ApiError | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def admitted(self, timer: Timer, timeout_s: float) -> None:
        """Returns when the first choice is admitted, or after timeout_s.  Raises the ApiError that
        came instead."""
        deadline = Deadline(timer, self._wake)
        deadline.set(timeout_s)
        try:
            while not self.is_admitted and self.unfinished and deadline.is_set:
                await self._change()
        finally:
            deadline.close()
        if self._error and not self.is_admitted:
            raise self._error

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Tokens | Finished:
        """The next event; none after an abort.  Raises the ApiError that ended the request."""
        while not self._events:
            if self._error:
                raise self._error
            if not self.unfinished:
                raise StopAsyncIteration
            await self._change()
        event, self.received_s = self._events.popleft()
        return event

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.abort()

    def abort(self, choice: int | None = None) -> None:
        """Ends the request, or one choice, with "abort".  May be called any time and repeatedly."""
        if choice is None:
            self._events = None
        if choice in self.unfinished or (choice is None and self.unfinished):
            self._abort(self.request, choice)

    # Only EngineClient calls the following.

    @property
    def has_ended(self) -> bool:
        return not self.unfinished

    @property
    def is_admitted(self) -> bool:
        return self.admitted_s is not None

    def admit(self, num_cached_tokens: int) -> None:
        if self.admitted_s is None:
            self.num_cached_tokens = num_cached_tokens
            self.admitted_s = time.monotonic()
        self._wake()

    def push(self, event: Tokens | Finished) -> None:
        if self._events is None:
            self._events = deque()
        self._events.append((event, time.monotonic()))
        if isinstance(event, Finished):
            self.unfinished = tuple(c for c in self.unfinished if c != event.choice)
        self._wake()

    def end(self, error: ApiError | None) -> None:
        self._error = error
        self.unfinished = ()
        self._wake()

    def lose(self, reason: str, code: str, is_poison: bool, retry: dict[str, str]) -> None:
        """Ends the request with its engine.  A request that was never admitted may be retried."""
        if is_poison:
            message = f"The server fails whenever it processes this request: {reason}."
            self.end(ApiError(500, message, code="engine_crashed", headers=NO_RETRY))
        elif self.is_admitted:
            message = f"The server had an error while processing your request: {reason}."
            self.end(ApiError(500, message, code=code))
        else:
            message = f"The model is not ready: {reason}."
            self.end(ApiError(503, message, code=code, headers=retry))

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _change(self) -> asyncio.Future[None]:
        """Done when something has changed."""
        assert self._waiter is None or self._waiter.done(), "a generation is for one task"
        self._waiter = asyncio.get_running_loop().create_future()
        return self._waiter
