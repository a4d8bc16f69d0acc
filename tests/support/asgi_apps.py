"""Small ASGI applications and raw requests for tests of the HTTP server."""

import asyncio
import threading

from llmsrv.asgi.types import ASGIApp
from llmsrv.asgi.types import ClientDisconnected
from llmsrv.asgi.types import Receive
from llmsrv.asgi.types import Scope
from llmsrv.asgi.types import Send
from tests.support.serving import PATIENCE_S
from tests.support.serving import Serving
from tests.support.serving import read_body
from tests.support.serving import send_response

GET = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"
CLOSE = b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\n"
STREAM_START = {"type": "http.response.start", "status": 200, "headers": []}


class Gate:
    """Lets an application wait for the test, and the test for the application."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._opened = asyncio.Event()

    async def wait(self) -> None:
        self.reached.set()
        await self._opened.wait()

    def await_application(self) -> None:
        assert self.reached.wait(PATIENCE_S)

    def open(self, server: Serving) -> None:
        server.loop.call_soon_threadsafe(self._opened.set)


def chunk(data: bytes, more_body: bool = True) -> dict[str, object]:
    return {"type": "http.response.body", "body": data, "more_body": more_body}


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    body = await read_body(receive)
    if body is not None:
        await send_response(send, body)


async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers without reading the body."""
    await send_response(send, b"no", 401)


class Disconnects:
    """Sends no response, or half a stream, and records when the client is gone."""

    def __init__(self, streams: bool) -> None:
        self.started = threading.Event()
        self.noticed = threading.Event()
        self._streams = streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await read_body(receive)
        if self._streams:
            await send(STREAM_START)
            await send(chunk(b"first"))
        self.started.set()
        assert (await receive())["type"] == "http.disconnect"
        await send(chunk(b"nobody reads this"))
        self.noticed.set()
        raise ClientDisconnected


def in_two_parts(gate: Gate, ping: bytes = b"") -> ASGIApp:
    """Streams a, and b once the gate is open."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({**STREAM_START, "ping": ping})
        await send(chunk(b"a"))
        await gate.wait()
        await send(chunk(b"b", more_body=False))

    return app
