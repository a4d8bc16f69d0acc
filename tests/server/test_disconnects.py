"""Clients that read slowly, reset, or close their half, over real sockets on both loops."""

import asyncio
import threading

import pytest

from llmsrv.asgi.types import ClientDisconnected
from llmsrv.asgi.types import Receive
from llmsrv.asgi.types import Scope
from llmsrv.asgi.types import Send
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
from tests.support.serving import PATIENCE_S
from tests.support.serving import parse_answers
from tests.support.serving import read_body
from tests.support.serving import send_response


def test_62_a_reader_that_stops_blocks_the_application_and_is_aborted(serve: Serve) -> None:
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
            # Beyond the high-water mark, only the kernel's buffers fill.
            assert produced < 8 * 1024 * 1024


def test_63_a_reader_below_the_minimum_rate_is_aborted(serve: Serve) -> None:
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
def test_the_application_learns_of_a_reset_at_once(serve: Serve, streams: bool) -> None:
    app = Disconnects(streams)
    with serve(app) as server:
        client = server.connect()
        client.send(GET)
        assert app.started.wait(PATIENCE_S)
        client.reset()
        assert app.noticed.wait(0.1)
        assert server.counters.client_disconnected == 1


def test_65_after_a_fin_a_response_that_does_not_start_in_time_is_cancelled(serve: Serve) -> None:
    app = Disconnects(streams=False)
    with serve(app, half_close_grace_s=0.05) as server, server.connect() as client:
        client.send(GET)
        client.finish()
        assert client.read_to_end() == b""
        assert app.noticed.wait(PATIENCE_S)


def test_65_after_a_fin_prompt_and_pipelined_responses_are_still_sent(serve: Serve) -> None:
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


def test_67_a_client_that_closes_during_a_silent_stream_is_noticed(serve: Serve) -> None:
    """It has read everything, so its kernel sends no reset, and the FIN may close only its half."""
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


def test_65_a_client_that_closed_its_half_gets_pings_and_the_rest(serve: Serve) -> None:
    gate = Gate()
    app = in_two_parts(gate, ping=b"-")
    with serve(app, half_close_grace_s=0.05) as server, server.connect() as client:
        client.send(GET)
        gate.await_application()
        client.finish()
        data = client.read_until(b"1\r\n-\r\n1\r\n-\r\n")
        gate.open(server)
        assert parse_answers(data + client.read_to_end())[0].body == b"a--b"


def test_69_a_thousand_resets_leave_no_connection_or_task(serve: Serve) -> None:
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


def test_after_its_response_an_application_receives_a_disconnect(serve: Serve) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await read_body(receive)
        watch = asyncio.ensure_future(receive())
        await asyncio.sleep(0)
        await send_response(send, b"ok")
        assert (await watch)["type"] == (await receive())["type"] == "http.disconnect"

    with serve(app) as server:
        assert [answer.body for answer in server.exchange(GET + CLOSE)] == [b"ok", b"ok"]
