"""Time, flow control and disconnects of one connection, over real sockets on both loops."""

import asyncio
import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from llmsrv.asgi.types import ASGIApp
from llmsrv.asgi.types import ClientDisconnected
from llmsrv.asgi.types import Receive
from llmsrv.asgi.types import Scope
from llmsrv.asgi.types import Send
from llmsrv.asgi.types import StreamBroken
from llmsrv.server.settings import ServerSettings
from tests.support.serving import LOOPS
from tests.support.serving import PATIENCE_S
from tests.support.serving import Serving
from tests.support.serving import parse_answers
from tests.support.serving import read_body
from tests.support.serving import send_response
from tests.support.serving import serving

GET = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"
CLOSE = b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\n"
EXPECT = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n"
STREAM_START = {"type": "http.response.start", "status": 200, "headers": []}

Serve = Callable[..., AbstractContextManager[Serving]]


@pytest.fixture(params=list(LOOPS))
def serve(request: pytest.FixtureRequest) -> Serve:
    def serve_on_loop(app: ASGIApp, **settings: float) -> AbstractContextManager[Serving]:
        return serving(app, ServerSettings(**settings), request.param)  # type: ignore[arg-type]

    return serve_on_loop


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
    """Answers without a look at the body."""
    await send_response(send, b"no", 401)


class Disconnects:
    """An application that answers nothing, or half a stream, and notes when the client is gone."""

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


# Bodies, and answers that do not wait for them.


def test_51_a_refusal_reaches_a_client_that_uploads_8_mib_regardless(serve: Serve) -> None:
    size = 8 * 1024 * 1024
    with serve(refuse) as server, server.connect() as client:
        client.send(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % size)
        client.send(bytes(size))
        (answer,) = client.answers()
    assert (answer.status, answer.headers["connection"]) == (401, "close")


def test_40_a_body_over_the_limit_is_refused_before_it_is_sent(serve: Serve) -> None:
    with serve(echo) as server, server.connect() as client:
        client.send(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 8388609\r\n\r\n")
        assert client.answers()[0].status == 413


def test_50_an_unread_body_that_is_there_does_not_end_the_connection(serve: Serve) -> None:
    with serve(refuse) as server, server.connect() as client:
        client.send(POST + b"12345" + CLOSE)
        assert [answer.status for answer in client.answers()] == [401, 401]


def test_an_upload_of_the_largest_size_arrives_whole(serve: Serve) -> None:
    body = bytes(range(256)) * 4 * 8192
    with serve(echo) as server, server.connect() as client:
        head = b"POST / HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
        client.send(head % len(body) + body)
        assert client.answers()[0].body == body


def test_52_100_continue_is_sent_when_the_application_asks_for_the_body(serve: Serve) -> None:
    with serve(echo) as server, server.connect() as client:
        client.send(EXPECT)
        assert client.read_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(b"12345" + CLOSE)
        assert [answer.body for answer in client.answers()] == [b"12345", b""]


def test_52_a_refusal_comes_in_place_of_100_continue(serve: Serve) -> None:
    with serve(refuse) as server:
        (answer,) = server.exchange(EXPECT)
    assert (answer.status, answer.headers["connection"]) == (401, "close")


def test_52_no_100_continue_to_one_who_does_not_wait_or_speaks_1_0(serve: Serve) -> None:
    with serve(echo) as server, server.connect() as client, server.connect() as old:
        client.send(EXPECT + b"12345" + CLOSE)
        old.send(EXPECT.replace(b"/1.1", b"/1.0"))
        old.send(b"12345")
        assert b" 100 " not in client.read_to_end() + old.read_to_end()


def test_52_a_body_that_was_continued_and_never_comes_is_408(serve: Serve) -> None:
    with serve(echo, body_timeout_s=0.05) as server:
        (answer,) = server.exchange(EXPECT)
    assert answer.status == 408


# Deadlines.


def test_57_a_silent_connection_is_closed(serve: Serve) -> None:
    with serve(echo, header_timeout_s=0.05, linger_timeout_s=0.05) as server:
        assert server.exchange(b"") == []


def test_58_a_head_has_one_deadline_however_it_dribbles(serve: Serve) -> None:
    with serve(echo, header_timeout_s=0.1) as server, server.connect() as client:
        client.socket.settimeout(0.01)
        data = b""
        for byte in GET * 10:
            try:
                client.send(b"x" if byte in b"\r\n" else b"%c" % byte)
                data += client.socket.recv(65536)
                break
            except TimeoutError:
                pass
        assert parse_answers(data)[0].status == 408


def test_58_the_next_head_has_its_deadline_too(serve: Serve) -> None:
    with serve(echo, header_timeout_s=0.05) as server:
        statuses = [answer.status for answer in server.exchange(GET + GET[:9])]
    assert statuses == [200, 408]


def test_59_a_body_that_stops_is_408_and_others_go_on(serve: Serve) -> None:
    with serve(echo, body_timeout_s=0.1) as server, server.connect() as slow:
        slow.send(POST + b"123")
        assert server.exchange(CLOSE)[0].status == 200
        assert slow.answers()[0].status == 408


def test_59_a_body_that_keeps_the_rate_outlives_the_deadline(serve: Serve) -> None:
    with serve(echo, body_timeout_s=0.02, min_rate_bytes=1) as server, server.connect() as client:
        client.send(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\nConnection: close\r\n\r\n")
        client.send(b"12345678")  # eight seconds' worth
        client.socket.settimeout(0.1)
        with pytest.raises(TimeoutError):
            client.socket.recv(1)
        client.socket.settimeout(PATIENCE_S)
        client.send(b"9")
        assert client.answers()[0].body == b"123456789"


def test_61_an_idle_connection_is_closed_with_a_clean_fin(serve: Serve) -> None:
    with serve(echo, keep_alive_timeout_s=0.05) as server, server.connect() as client:
        client.send(GET)
        client.read_until(b"\r\n\r\n")
        assert client.read_to_end() == b""
        client.send(GET)  # too late, but no reset: the client may safely try again
        assert client.read_to_end() == b""


# Pipelining.


def in_two_parts(gate: Gate, ping: bytes = b"") -> ASGIApp:
    """Streams a, and b once the gate is open."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({**STREAM_START, "ping": ping})
        await send(chunk(b"a"))
        await gate.wait()
        await send(chunk(b"b", more_body=False))

    return app


def test_54_garbage_behind_a_running_stream_waits_and_is_refused_after_it(serve: Serve) -> None:
    gate = Gate()
    with serve(in_two_parts(gate)) as server, server.connect() as client:
        client.send(GET)
        gate.await_application()
        client.socket.setblocking(False)
        sent = 0
        try:
            while sent < 64 * 1024 * 1024:
                sent += client.socket.send(b"\xff" * 65536)
        except BlockingIOError:
            pass
        assert sent < 64 * 1024 * 1024, "the server reads without bound"
        client.socket.settimeout(PATIENCE_S)
        gate.open(server)
        stream, refusal = client.answers()
    assert stream.body == b"ab" and refusal.status == 400


# Slow and vanished readers.


def test_62_a_reader_that_stops_holds_the_producer_back_and_is_aborted(serve: Serve) -> None:
    produced = 0
    ended = threading.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal produced
        await read_body(receive)
        gone = asyncio.ensure_future(receive())
        await send(STREAM_START)
        while not gone.done():
            await send(chunk(bytes(1000)))
            await asyncio.sleep(0)
            produced += 1000
        ended.set()

    with serve(app, write_stall_timeout_s=0.1) as server:
        with server.connect(receive_buffer_bytes=4096) as client:
            client.send(GET)
            assert ended.wait(PATIENCE_S)
            assert server.counters.client_stalled == 1
            # Beyond the high-water mark only what the kernel's buffers take.
            assert produced < 8 * 1024 * 1024


def test_63_a_reader_below_the_rate_is_aborted_although_it_reads(serve: Serve) -> None:
    app = Disconnects(streams=True)

    async def flooding(scope: Scope, receive: Receive, send: Send) -> None:
        await send(STREAM_START)
        await send(chunk(bytes(8 * 1024 * 1024)))
        await app(scope, receive, lambda message: asyncio.sleep(0))

    settings = {"write_stall_timeout_s": 0.2, "min_rate_bytes": 1024 * 1024 * 1024}
    with serve(flooding, **settings) as server, server.connect(4096) as client:
        client.send(GET)
        client.read_until(b"\r\n\r\n")
        assert app.noticed.wait(PATIENCE_S)
        assert server.counters.client_stalled == 1


@pytest.mark.parametrize("streams", [True, False], ids=["64-stream", "68-waiting"])
def test_a_reset_is_told_to_the_application_at_once(serve: Serve, streams: bool) -> None:
    app = Disconnects(streams)
    with serve(app) as server:
        client = server.connect()
        client.send(GET)
        assert app.started.wait(PATIENCE_S)
        client.reset()
        assert app.noticed.wait(0.1)
        assert server.counters.client_disconnected == 1


def test_65_fin_gives_an_answer_a_moment_and_then_cancels(serve: Serve) -> None:
    app = Disconnects(streams=False)
    with serve(app, half_close_grace_s=0.05) as server, server.connect() as client:
        client.send(GET)
        client.finish()
        assert client.read_to_end() == b""
        assert app.noticed.wait(PATIENCE_S)


def test_65_fin_lets_an_answer_in_time_and_pipelined_ones_out(serve: Serve) -> None:
    with serve(echo) as server, server.connect() as client:
        client.send(GET + POST + b"12345")
        client.finish()
        assert [answer.body for answer in client.answers()] == [b"", b"12345"]


def test_65_fin_does_not_end_a_stream(serve: Serve) -> None:
    gate = Gate()
    with serve(in_two_parts(gate), half_close_grace_s=0.01) as server, server.connect() as client:
        client.send(GET)
        gate.await_application()
        client.finish()
        client.socket.settimeout(0.1)
        data = client.read_until(b"1\r\na\r\n")
        with pytest.raises(TimeoutError):
            client.socket.recv(1)
        gate.open(server)
        assert parse_answers(data + client.read_to_end())[0].body == b"ab"


def test_67_a_client_that_closes_while_a_stream_is_silent_is_noticed(serve: Serve) -> None:
    """Having read all there is, it sends no reset, and a FIN might be of its half only."""
    noticed = threading.Event()

    async def silent(scope: Scope, receive: Receive, send: Send) -> None:
        await read_body(receive)
        await send({**STREAM_START, "ping": b": ping"})
        await send(chunk(b"first"))
        assert (await receive())["type"] == "http.disconnect"
        noticed.set()
        raise ClientDisconnected

    with serve(silent, half_close_grace_s=0.05) as server:
        with server.connect() as client:
            client.send(GET)
            client.read_until(b"first\r\n")
        assert noticed.wait(PATIENCE_S)
        assert server.counters.client_disconnected == 1


def test_65_a_client_that_closed_its_half_gets_a_ping_and_the_rest(serve: Serve) -> None:
    gate = Gate()
    app = in_two_parts(gate, ping=b"-")
    with serve(app, half_close_grace_s=0.05) as server, server.connect() as client:
        client.send(GET)
        gate.await_application()
        client.finish()
        data = client.read_until(b"1\r\n-\r\n1\r\n-\r\n")
        gate.open(server)
        assert parse_answers(data + client.read_to_end())[0].body == b"a--b"


def test_69_a_thousand_resets_leave_nothing_behind(serve: Serve) -> None:
    with serve(Disconnects(streams=True)) as server:
        for _ in range(1000):
            client = server.connect()
            client.send(GET)
            client.reset()
        server.drain()
        assert server.counters.open_connections == 0
        assert server.call(_running_tasks()) == 0


async def _running_tasks() -> int:
    return len(asyncio.all_tasks()) - 1


def test_after_its_response_an_application_is_told_of_a_disconnect(serve: Serve) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await read_body(receive)
        watch = asyncio.ensure_future(receive())
        await asyncio.sleep(0)
        await send_response(send, b"ok")
        assert (await watch)["type"] == (await receive())["type"] == "http.disconnect"

    with serve(app) as server:
        assert [answer.body for answer in server.exchange(GET + CLOSE)] == [b"ok", b"ok"]


# Applications that fail.


def test_an_application_that_raises_is_a_500_and_one_log_line(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise ZeroDivisionError

    with serve(app) as server, caplog.at_level(logging.INFO):
        (answer,) = server.exchange(GET)
        assert server.counters.app_errors == 1
    assert answer.status == 500 and b'"server_error"' in answer.body
    assert len(caplog.records) == 1 and caplog.records[0].exc_info


def test_an_application_that_returns_without_an_answer_is_a_500(serve: Serve) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        pass

    with serve(app) as server:
        assert server.exchange(GET)[0].status == 500


@pytest.mark.parametrize("error", [StreamBroken, ClientDisconnected, ZeroDivisionError])
def test_a_stream_that_breaks_delivers_what_was_sent_and_no_final_chunk(
    serve: Serve, error: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(STREAM_START)
        await send(chunk(b"data: {}\n\n"))
        raise error

    with serve(app) as server, server.connect() as client, caplog.at_level(logging.INFO):
        client.send(GET)
        data = client.read_to_end()
    assert data.endswith(b"\r\n\r\na\r\ndata: {}\n\n\r\n")
    assert len(caplog.records) == (error is ZeroDivisionError)


def test_a_body_unlike_its_content_length_is_never_taken_for_complete(serve: Serve) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200}
        await send({**start, "headers": [(b"content-length", b"5")]})
        await send(chunk(b"123"))
        await send(chunk(b"4" if scope["path"] == "/short" else b"456", more_body=False))

    with serve(app) as server:
        for path in (b"/short", b"/long"):
            with server.connect() as client:
                client.send(GET.replace(b"/", path, 1))
                assert client.read_to_end().endswith(b"\r\n\r\n123")


def test_a_header_that_splits_the_response_is_a_500(serve: Serve) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send_response(send, b"", 200, (b"x", b"a\r\nset-cookie: b"))

    with serve(app) as server:
        assert server.exchange(GET)[0].status == 500


# Draining.


def test_draining_closes_the_idle_and_lets_the_running_end(serve: Serve) -> None:
    gate = Gate()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/wait":
            await gate.wait()
        await send_response(send, b"done")

    with serve(app) as server:
        with server.connect() as idle, server.connect() as silent, server.connect() as running:
            idle.send(GET)
            idle.read_until(b"done")
            running.send(GET.replace(b"/", b"/wait", 1))
            gate.await_application()
            draining = asyncio.run_coroutine_threadsafe(server.server.drain(60), server.loop)
            assert idle.read_to_end() == silent.read_to_end() == b""
            with pytest.raises(ConnectionRefusedError):
                server.connect()
            gate.open(server)
            (answer,) = running.answers()
        draining.result(PATIENCE_S)
    assert (answer.body, answer.headers["connection"]) == (b"done", "close")


def test_draining_cuts_off_what_outlives_the_grace_and_tells_it(serve: Serve) -> None:
    app = Disconnects(streams=True)
    with serve(app) as server, server.connect() as client:
        client.send(GET)
        assert app.started.wait(PATIENCE_S)
        server.drain(grace_s=0.05)
        assert app.noticed.is_set()


def test_draining_can_be_called_again_with_less_patience(serve: Serve) -> None:
    app = Disconnects(streams=False)
    with serve(app) as server, server.connect() as client:
        client.send(GET)
        assert app.started.wait(PATIENCE_S)
        patient = asyncio.run_coroutine_threadsafe(server.server.drain(60), server.loop)
        server.drain(0)
        assert app.noticed.is_set()
        patient.result(PATIENCE_S)


def test_head_and_body_leave_in_one_write(serve: Serve) -> None:
    with serve(echo) as server, server.connect() as client:
        client.send(POST + b"12345")
        assert client.socket.recv(65536).endswith(b"\r\n\r\n12345")
