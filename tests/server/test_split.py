"""The application and the client see the same however the bytes of requests are cut into reads.

These tests run in memory, with a transport that behaves like that of a socket.
"""

import asyncio
import re
from typing import Any
from typing import cast

from hypothesis import given
from hypothesis import strategies as st

from llmsrv.asgi.types import Scope
from llmsrv.server.connection import Connection
from llmsrv.server.connection import ServerState
from llmsrv.server.settings import ServerCounters
from llmsrv.server.settings import ServerSettings
from tests.support.serving import recording
from tests.support.serving import serving

GET = b"GET /%d HTTP/1.1\r\nHost: h\r\n\r\n"
REQUESTS = [
    GET % 1,
    b"\r\n" + GET % 2,
    b"HEAD / HTTP/1.1\r\nHost: h\r\nX: a\tb \r\n\r\n",
    b"POST /l HTTP/1.1\r\nHost: h\r\nContent-Length: 11\r\n\r\nGET / HTTP/1",
    b"POST /c HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: Chunked\r\n\r\n"
    b'3;a="\\""\r\nabc\r\n002\r\n\r\n\r\n0\r\nX: y\r\n\r\n',
    b"POST /e HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST http://h/a?b HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nConnection: x, y\r\n\r\n\n",
]
ENDS = [
    b"GET /last HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n" + GET % 3,
    b"GET / HTTP/1.0\r\n\r\nrest",
    b"GET / HTTP/1.1\nHost: h\n\n",
    b"GET / HTTP/1.1\r\nHost: h\r\nX : y\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nab\r\n" + GET % 4,
    b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\nhalf",
]


class MemoryTransport:
    """The transport methods that a connection uses; written data is kept and drained at once."""

    def __init__(self, connection: Connection) -> None:
        self.written = b""
        self.is_reading = True
        self.is_finished = False
        self._connection = connection
        self._is_closing = False
        connection.connection_made(cast(asyncio.Transport, self))

    def feed(self, data: bytes) -> None:
        while data and not self._is_closing:
            assert self.is_reading
            room = self._connection.get_buffer(-1)
            piece, data = data[: len(room)], data[len(room) :]
            room[: len(piece)] = piece
            self._connection.buffer_updated(len(piece))

    def feed_eof(self) -> None:
        if not self._is_closing and not self._connection.eof_received():
            self.close()

    def write(self, data: bytes) -> None:
        assert not self.is_finished, "written after FIN"
        self.written += data

    def write_eof(self) -> None:
        self.is_finished = True

    def close(self) -> None:
        if not self._is_closing:
            self._is_closing = True
            asyncio.get_running_loop().call_soon(self._connection.connection_lost, None)

    abort = close

    def is_closing(self) -> bool:
        return self._is_closing

    def pause_reading(self) -> None:
        assert self.is_reading
        self.is_reading = False

    def resume_reading(self) -> None:
        assert not self.is_reading
        self.is_reading = True

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int) -> None:
        pass

    def get_extra_info(self, name: str) -> Any:
        return ("127.0.0.1", 1)


async def converse(pieces: list[bytes]) -> tuple[bytes, list[Scope]]:
    """Feeds the pieces, a few loop turns apart; returns what the client and the app see."""
    scopes: list[Scope] = []
    state = ServerState(recording(scopes), ServerSettings(), ServerCounters())
    transport = MemoryTransport(Connection(state))
    for piece in pieces:
        transport.feed(piece)
        for _ in range(3):
            await asyncio.sleep(0)
    transport.feed_eof()
    while state.tasks:
        await asyncio.sleep(0)
    return masked(transport.written), scopes


def masked(answers: bytes) -> bytes:
    return re.sub(rb"(date|x-request-id): [^\r]*", rb"\1: -", answers)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    bounds = [0, *sorted({place % (len(data) + 1) for place in places}), len(data)]
    return [data[start:end] for start, end in zip(bounds, bounds[1:])]


conversations = st.builds(
    lambda requests, end: b"".join(requests) + end,
    st.lists(st.sampled_from(REQUESTS), max_size=4),
    st.sampled_from([b"", *ENDS]),
)


@given(data=conversations, places=st.lists(st.integers(0, 2000), max_size=20))
def test_55_requests_cut_anywhere_get_the_same_responses(data: bytes, places: list[int]) -> None:
    assert asyncio.run(converse(cut(data, places))) == asyncio.run(converse([data]))


def test_55_requests_byte_by_byte_get_the_same_responses() -> None:
    for end in ENDS:
        data = b"".join(REQUESTS) + end
        pieces = [b"%c" % byte for byte in data]
        assert asyncio.run(converse(pieces)) == asyncio.run(converse([data]))


def test_the_memory_transport_behaves_like_a_socket() -> None:
    for end in ENDS:
        data = b"".join(REQUESTS) + end
        scopes: list[Scope] = []
        with serving(recording(scopes)) as server, server.connect() as client:
            client.send(data)
            client.finish()
            answers = masked(client.read_to_end())
        in_memory, scopes_in_memory = asyncio.run(converse([data]))
        assert in_memory == answers
        assert [s["raw_path"] for s in scopes_in_memory] == [s["raw_path"] for s in scopes]
