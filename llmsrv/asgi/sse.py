"""Server-sent events (WHATWG HTML section 9.2).

A plain payload is sent as a `data:` field alone, as OpenAI's clients expect: one that meets an
`event:`, `id:` or `retry:` field without data makes an empty event of it and fails to parse that as
JSON.  An Event can also have an `event:` field, for the dialects whose clients read it.
"""

import asyncio
from collections.abc import AsyncIterator
from collections.abc import Callable
from typing import NamedTuple

from llmsrv.asgi.types import ClientDisconnected
from llmsrv.asgi.types import Message
from llmsrv.asgi.types import RawHeaders
from llmsrv.asgi.types import Send
from llmsrv.asgi.types import StreamBroken
from llmsrv.errors import ApiError

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


class EventStream:
    """A response that sends each item of `events` as one event; plain bytes are its data.

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
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self.headers = [*HEADERS, *headers]
        self._events = events
        self._ping_s = ping_s
        self._on_end = on_end
        self._last_sent_at = 0.0
        self._ping_timer: asyncio.TimerHandle | None = None
        self._ping: asyncio.Task[None] | None = None

    async def __call__(
        self, send: Send, error_event: Callable[[ApiError], bytes | Event] = ApiError.body
    ) -> None:
        """error_event encodes the event of an error: see dialect.py."""
        try:
            start = {"type": "http.response.start", "status": 200, "headers": self.headers}
            await send({**start, "ping": PING})
            await self._send(send, b"")
            self._ping_later(send, self._ping_s)
            async for event in self._events:
                await self._send(send, frame(event))
        except ApiError as error:
            await self._send(send, frame(error_event(error)))
            raise StreamBroken from error
        except ClientDisconnected:
            raise
        except Exception:
            await self._send(send, frame(error_event(ApiError(500, "The server failed."))))
            raise
        finally:
            for pinging in (self._ping_timer, self._ping):
                if pinging:
                    pinging.cancel()
            self._on_end()
            if aclose := getattr(self._events, "aclose", None):
                await aclose()
        await send(_body(b"", more_body=False))

    async def _send(self, send: Send, data: bytes) -> None:
        await send(_body(data, more_body=True))
        self._last_sent_at = asyncio.get_running_loop().time()

    def _ping_later(self, send: Send, delay_s: float) -> None:
        # A timer, not a task that sleeps: thousands of streams may wait.
        loop = asyncio.get_running_loop()
        self._ping_timer = loop.call_later(delay_s, self._ping_if_quiet, send)

    def _ping_if_quiet(self, send: Send) -> None:
        left_s = self._ping_s - (asyncio.get_running_loop().time() - self._last_sent_at)
        if left_s <= 0 and (self._ping is None or self._ping.done()):
            self._ping = asyncio.create_task(self._send(send, PING))
        self._ping_later(send, left_s if left_s > 0 else self._ping_s)


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
