"""Our HTTP server on its own thread, and clients that send exactly the bytes they are given."""

import asyncio
import http.client
import io
import socket
import struct
import threading
from collections.abc import Callable
from collections.abc import Coroutine
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from typing import TypeVar
from typing import cast

import uvloop

from llmsrv.asgi.types import ASGIApp
from llmsrv.asgi.types import Receive
from llmsrv.asgi.types import Scope
from llmsrv.asgi.types import Send
from llmsrv.server.connection import ErrorHeaders
from llmsrv.server.listener import bind
from llmsrv.server.server import Server
from llmsrv.server.settings import ServerCounters
from llmsrv.server.settings import ServerSettings

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "uvloop": uvloop.new_event_loop,
    "asyncio": asyncio.new_event_loop,
}
PATIENCE_S = 5.0

T = TypeVar("T")


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


class Client:
    """A plain socket; every read gives up after PATIENCE_S."""

    def __init__(self, port: int, receive_buffer_bytes: int = 0) -> None:
        self.socket = socket.socket()
        if receive_buffer_bytes:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        self.socket.settimeout(PATIENCE_S)
        self.socket.connect(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def finish(self) -> None:
        self.socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Closes with RST instead of FIN."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def read_until(self, end: bytes) -> bytes:
        data = b""
        while end not in data:
            piece = self.socket.recv(65536)
            assert piece, f"closed after {data!r}"
            data += piece
        return data

    def read_to_end(self) -> bytes:
        return b"".join(iter(lambda: self.socket.recv(65536), b""))

    def answers(self) -> list[Answer]:
        return parse_answers(self.read_to_end())


def parse_answers(data: bytes, methods: tuple[str, ...] = ()) -> list[Answer]:
    """All responses in data, read by http.client; `methods` are those of the requests."""
    stream = io.BytesIO(data)
    answers: list[Answer] = []
    while stream.tell() < len(data):
        method = methods[len(answers)] if len(answers) < len(methods) else "GET"
        sock = cast(socket.socket, _Socket(stream))
        response = http.client.HTTPResponse(sock, method=method)
        response.begin()
        if response.status == 100:
            continue
        answers.append(Answer(response.status, dict(response.getheaders()), response.read()))
    return answers


class _Socket:
    """The part of a socket that http.client uses; all responses share one stream."""

    def __init__(self, stream: io.BytesIO) -> None:
        self._stream = stream

    def makefile(self, mode: str) -> Any:
        return _Unclosable(self._stream)


class _Unclosable(io.BufferedReader):
    def __init__(self, stream: io.BytesIO) -> None:
        # A buffer of one byte, so that the next response is not read ahead.
        super().__init__(stream, buffer_size=1)

    def close(self) -> None:
        pass


class Serving:
    """A running server: its port, its counters, and access to its event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, server: Server, port: int) -> None:
        self.loop = loop
        self.server = server
        self.port = port

    @property
    def counters(self) -> ServerCounters:
        return self.server.counters

    def connect(self, receive_buffer_bytes: int = 0) -> Client:
        return Client(self.port, receive_buffer_bytes)

    def exchange(self, request: bytes) -> list[Answer]:
        """Sends the request and reads until the server closes."""
        with self.connect() as client:
            client.send(request)
            return client.answers()

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine in the server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(PATIENCE_S)

    def drain(self, grace_s: float = 0.0) -> None:
        self.call(self.server.drain(grace_s))


@contextmanager
def serving(
    app: ASGIApp,
    settings: ServerSettings = ServerSettings(),
    loop: str = "uvloop",
    error_headers: ErrorHeaders = lambda origin: (),
) -> Iterator[Serving]:
    """Serves app on a free port of 127.0.0.1 until the block ends."""
    event_loop = LOOPS[loop]()
    sockets = bind("127.0.0.1", 0)
    server = Server(app, sockets, settings, error_headers)
    thread = threading.Thread(target=event_loop.run_forever)
    thread.start()
    running = Serving(event_loop, server, sockets[0].getsockname()[1])
    running.call(server.start())
    try:
        yield running
    finally:
        running.drain()
        tasks = asyncio.all_tasks(event_loop)
        event_loop.call_soon_threadsafe(event_loop.stop)
        thread.join(PATIENCE_S)
        event_loop.close()
    assert not tasks, "an application was not told that its client is gone"


async def send_response(
    send: Send, body: bytes, status: int = 200, *headers: tuple[bytes, bytes]
) -> None:
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})
    await send({"type": "http.response.body", "body": body})


async def read_body(receive: Receive) -> bytes | None:
    """The whole body; None if the client goes away first."""
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += bytes(message["body"])
        if not message["more_body"]:
            return body


def recording(scopes: list[Scope]) -> ASGIApp:
    """An application that echoes the body, and records each scope with it as scope["body"]."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["body"] = await read_body(receive)
        scopes.append(scope)
        await send_response(send, scope["body"] or b"")

    return app
