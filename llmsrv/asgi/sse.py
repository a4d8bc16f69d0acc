"""Server-sent events (WHATWG HTML section 9.2).

A plain payload is sent as a `data:` field alone, as OpenAI's clients expect: one that meets an
`event:`, `id:` or `retry:` field without data makes an empty event of it and fails to parse that as
JSON.  An Event can also have an `event:` field, for the dialects whose clients read it.
"""

import asyncio
from collections.abc import AsyncIterator
from collections.abc import Awaitable
from collections.abc import Callable
from typing import NamedTuple

from llmsrv.asgi.types import ClientDisconnected
from llmsrv.asgi.types import Message
from llmsrv.asgi.types import RawHeaders
from llmsrv.asgi.types import Send
from llmsrv.asgi.types import StreamBroken
from llmsrv.errors import ApiError
from llmsrv.timing import Deadline
from llmsrv.timing import Timer

PING = b": ping\n\n"

HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # nginx would otherwise buffer the events and deliver them all at once.
    (b"x-accel-buffering", b"no"),
)


class Event(NamedTuple):
    """data: JSON on one line; event: the value of the `event:` field, None to send none."""

    data: bytes
    event: str | None = None


async def _no_wait(timer: Timer) -> None:
    pass


class EventStream:
    """A response that sends each item of `events` as one event; plain bytes are its data.

    Whoever sends it waits for ready() first: if that raises, the error can still be the response.
    The status and headers go out at once, not with the first event.  After ping_s seconds of
    silence a comment keeps proxies and the client's read timeout from ending the connection.  When
    `events` raises, the error is the last event, and the connection closes without the final chunk:
    after the status, only this shows a client that the response is incomplete.  However the stream
    ends, it closes `events` (aclose) and calls on_end: a generator that was never started does not
    run its own `finally`.
    """

    def __init__(
        self,
        events: AsyncIterator[bytes] | AsyncIterator[bytes | Event],
        ping_s: float = 10.0,
        headers: RawHeaders = (),
        ready: Callable[[Timer], Awaitable[None]] = _no_wait,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self.ready = ready
        self._events = events
        self._ping_s = ping_s
        self._headers = headers
        self._on_end = on_end

    async def __call__(
        self,
        send: Send,
        error_event: Callable[[ApiError], bytes | Event] = ApiError.body,
        timer: Timer | None = None,
    ) -> None:
        """error_event encodes the event of an error: see dialect.py.  timer: times the pings."""
        pings = _Pings(send, self._ping_s, timer or Timer())
        try:
            await send(self._start())
            await pings.send(b"")
            async for event in self._events:
                await pings.send(frame(event))
                del event  # or it would be kept until the next one
        except ApiError as error:
            await pings.send(frame(error_event(error)))
            raise StreamBroken from error
        except ClientDisconnected:
            raise
        except Exception:
            await pings.send(frame(error_event(ApiError(500, "The server failed."))))
            raise
        finally:
            pings.stop()
            self._on_end()
            if aclose := getattr(self._events, "aclose", None):
                await aclose()
        await send(_body(b"", more_body=False))

    def _start(self) -> Message:
        headers = [*HEADERS, *self._headers]
        return {"type": "http.response.start", "status": 200, "headers": headers, "ping": PING}


class _Pings:
    """Sends the pieces of a stream's body, and a ping whenever there was none for ping_s."""

    def __init__(self, send: Send, ping_s: float, timer: Timer) -> None:
        self._send = send
        self._ping_s = ping_s
        self._ping: asyncio.Task[None] | None = None
        self._deadline = Deadline(timer, self._ping_soon)

    async def send(self, data: bytes) -> None:
        await self._send(_body(data, more_body=True))
        self._deadline.set(self._ping_s)

    def stop(self) -> None:
        self._deadline.close()
        if self._ping:
            self._ping.cancel()

    def _ping_soon(self) -> None:
        if self._ping is None:  # else a ping still waits for a slow client
            self._ping = asyncio.create_task(self._send_ping())

    async def _send_ping(self) -> None:
        await self.send(PING)
        self._ping = None


def frame(event: bytes | Event) -> bytes:
    """The bytes of one event.  A line end inside a field would split it, so data must be JSON on
    one line."""
    data, name = event if isinstance(event, Event) else (event, None)
    assert b"\n" not in data and b"\r" not in data
    if name is None:
        return b"data: %b\n\n" % data
    assert "\n" not in name and "\r" not in name
    return b"event: %b\ndata: %b\n\n" % (name.encode(), data)


def _body(data: bytes, more_body: bool) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more_body}
