"""Bodies, deadlines, pipelining and draining of connections, over real sockets on both loops."""

import asyncio
import logging

import pytest

from llmsrv.asgi.types import ClientDisconnected
from llmsrv.asgi.types import Receive
from llmsrv.asgi.types import Scope
from llmsrv.asgi.types import Send
from llmsrv.asgi.types import StreamBroken
from tests.server.conftest import Serve
from tests.support.asgi_apps import CLOSE
from tests.support.asgi_apps import GET
from tests.support.asgi_apps import POST
from tests.support.asgi_apps import STREAM_START
from tests.support.asgi_apps import Disconnects
from tests.support.asgi_apps import Gate
from tests.support.asgi_apps import chunk
from tests.support.asgi_apps import echo
from tests.support.asgi_apps import in_two_parts
from tests.support.asgi_apps import refuse
from tests.support.serving import PATIENCE_S
from tests.support.serving import parse_answers
from tests.support.serving import send_response

EXPECT = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n"


# Bodies, and responses that do not wait for them.


def test_51_a_refusal_reaches_a_client_that_uploads_8_mib_anyway(serve: Serve) -> None:
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


def test_50_an_unread_body_that_has_arrived_does_not_end_the_connection(serve: Serve) -> None:
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


def test_52_a_refusal_is_sent_instead_of_100_continue(serve: Serve) -> None:
    with serve(refuse) as server:
        (answer,) = server.exchange(EXPECT)
    assert (answer.status, answer.headers["connection"]) == (401, "close")


def test_52_no_100_continue_for_a_client_that_does_not_wait_or_speaks_1_0(serve: Serve) -> None:
    with serve(echo) as server, server.connect() as client, server.connect() as old:
        client.send(EXPECT + b"12345" + CLOSE)
        old.send(EXPECT.replace(b"/1.1", b"/1.0"))
        old.send(b"12345")
        assert b" 100 " not in client.read_to_end() + old.read_to_end()


def test_52_a_body_that_never_comes_after_100_continue_is_408(serve: Serve) -> None:
    with serve(echo, body_timeout_s=0.05) as server:
        (answer,) = server.exchange(EXPECT)
    assert answer.status == 408


# Deadlines.


def test_57_a_silent_connection_is_closed(serve: Serve) -> None:
    with serve(echo, header_timeout_s=0.05, linger_timeout_s=0.05) as server:
        assert server.exchange(b"") == []


def test_58_a_head_that_dribbles_in_has_one_deadline(serve: Serve) -> None:
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


def test_59_a_body_that_stops_is_408_and_other_clients_are_served(serve: Serve) -> None:
    with serve(echo, body_timeout_s=0.1) as server, server.connect() as slow:
        slow.send(POST + b"123")
        assert server.exchange(CLOSE)[0].status == 200
        assert slow.answers()[0].status == 408


def test_59_a_body_at_the_minimum_rate_extends_its_deadline(serve: Serve) -> None:
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
        client.send(GET)  # too late, but there is no reset: the client can safely retry
        assert client.read_to_end() == b""


# Pipelining.


def test_54_garbage_after_a_streaming_request_is_refused_when_the_stream_ends(serve: Serve) -> None:
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


def test_an_application_that_returns_without_a_response_is_a_500(serve: Serve) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        pass

    with serve(app) as server:
        assert server.exchange(GET)[0].status == 500


@pytest.mark.parametrize("error", [StreamBroken, ClientDisconnected, ZeroDivisionError])
def test_a_broken_stream_delivers_what_was_sent_and_no_final_chunk(
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


def test_a_body_that_differs_from_its_content_length_never_looks_complete(serve: Serve) -> None:
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


def test_draining_closes_idle_connections_and_lets_requests_finish(serve: Serve) -> None:
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


def test_draining_disconnects_requests_that_outlive_the_grace_period(serve: Serve) -> None:
    app = Disconnects(streams=True)
    with serve(app) as server, server.connect() as client:
        client.send(GET)
        assert app.started.wait(PATIENCE_S)
        server.drain(grace_s=0.05)
        assert app.noticed.is_set()


def test_draining_can_be_called_again_with_a_shorter_grace_period(serve: Serve) -> None:
    app = Disconnects(streams=False)
    with serve(app) as server, server.connect() as client:
        client.send(GET)
        assert app.started.wait(PATIENCE_S)
        patient = asyncio.run_coroutine_threadsafe(server.server.drain(60), server.loop)
        server.drain(0)
        assert app.noticed.is_set()
        patient.result(PATIENCE_S)


def test_head_and_body_are_sent_in_one_write(serve: Serve) -> None:
    with serve(echo) as server, server.connect() as client:
        client.send(POST + b"12345")
        assert client.socket.recv(65536).endswith(b"\r\n\r\n12345")
