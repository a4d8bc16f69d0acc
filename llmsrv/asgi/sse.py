"""Server-sent events (WHATWG HTML section 9.2) as OpenAI's clients read them.

Only `data:` fields and comments are ever sent: a client that meets an `event:`, `id:` or `retry:`
field without data makes an empty event of it and fails to parse that as JSON.
"""

import asyncio
from collections.abc import AsyncIterator
from collections.abc import Callable

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
    # nginx would otherwise collect the events and deliver them in one piece.
    (b"x-accel-buffering", b"no"),
)


class EventStream:
    """An answer that sends each item of `events`, one JSON payload, as one event.

    The status and headers go out at once, not with the first event.  After ping_s quiet seconds a
    comment keeps proxies and the client's read timeout from ending the connection.  When `events`
    raises, the error is the last event and the connection breaks off without the final chunk:
    after the status only this tells a client that the answer is not complete.  However the stream
    ends, `events` is closed (aclose), and on_end called: a generator that was never begun does not
    come to its own `finally`.
    """

    def __init__(
        self,
        events: AsyncIterator[bytes],
        ping_s: float = 10.0,
        headers: RawHeaders = (),
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self.headers = [*HEADERS, *headers]
        self._events = events
        self._ping_s = ping_s
        self._on_end = on_end
        self._last_sent_at = 0.0

    async def __call__(self, send: Send) -> None:
        pinger: asyncio.Task[None] | None = None
        try:
            start = {"type": "http.response.start", "status": 200, "headers": self.headers}
            await send({**start, "ping": PING})
            await self._send(send, b"")
            pinger = asyncio.create_task(self._send_pings(send))
            async for payload in self._events:
                await self._send(send, frame(payload))
        except ApiError as error:
            await self._send(send, frame(error.body()))
            raise StreamBroken from error
        except ClientDisconnected:
            raise
        except Exception:
            await self._send(send, frame(ApiError(500, "The server failed.").body()))
            raise
        finally:
            if pinger:
                pinger.cancel()
            self._on_end()
            if aclose := getattr(self._events, "aclose", None):
                await aclose()
        await send(_body(b"", more_body=False))

    async def _send(self, send: Send, data: bytes) -> None:
        await send(_body(data, more_body=True))
        self._last_sent_at = asyncio.get_running_loop().time()

    async def _send_pings(self, send: Send) -> None:
        now = asyncio.get_running_loop().time
        while True:
            quiet_s = now() - self._last_sent_at
            if quiet_s < self._ping_s:
                await asyncio.sleep(self._ping_s - quiet_s)
            else:
                await self._send(send, PING)


def frame(payload: bytes) -> bytes:
    """One event.  A raw line end would split it, so the payload must be JSON on one line."""
    assert b"\n" not in payload and b"\r" not in payload
    return b"data: %b\n\n" % payload


def _body(data: bytes, more_body: bool) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more_body}
