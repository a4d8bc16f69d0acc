"""Binding, and accepting connections when no file descriptors are left."""

import asyncio
import os
import resource
import socket
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from llmsrv.asgi.types import Receive
from llmsrv.asgi.types import Scope
from llmsrv.asgi.types import Send
from llmsrv.errors import StartupError
from llmsrv.server.listener import bind
from llmsrv.server.server import run
from tests.support.parameters import slow_but
from tests.support.serving import LOOPS
from tests.support.serving import PATIENCE_S
from tests.support.serving import parse_answers
from tests.support.serving import send_response
from tests.support.serving import serving

CLOSE = b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"


async def answer_ok(scope: Scope, receive: Receive, send: Send) -> None:
    await send_response(send, b"ok")


def test_the_error_for_a_port_in_use_suggests_another() -> None:
    with bind("127.0.0.1", 0)[0] as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartupError, match=f"port {port} is in use; try --port {port + 1}"):
            bind("127.0.0.1", port)


def test_the_error_for_a_host_that_is_not_local_names_it() -> None:
    with pytest.raises(StartupError, match="'192.0.2.1'.*try --host 127.0.0.1"):
        bind("192.0.2.1", 0)


def test_all_addresses_of_a_host_share_one_port() -> None:
    sockets = bind("localhost", 0)
    assert len({sock.getsockname()[1] for sock in sockets}) == 1
    for sock in sockets:
        sock.close()


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux has it")
def test_66_a_client_that_vanishes_silently_is_dropped_after_30_s() -> None:
    with bind("127.0.0.1", 0)[0] as listener, socket.create_connection(listener.getsockname()):
        listener.setblocking(True)
        with listener.accept()[0] as accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000


@pytest.mark.skipif(not hasattr(socket, "TCP_KEEPIDLE"), reason="other names elsewhere")
def test_66_a_client_that_vanishes_is_noticed_even_if_there_is_nothing_to_send() -> None:
    """As for a whole answer that is still waiting: the kernel probes the client."""
    with bind("127.0.0.1", 0)[0] as listener, socket.create_connection(listener.getsockname()):
        listener.setblocking(True)
        with listener.accept()[0] as accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            idle_s = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
            interval_s = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL)
            num_probes = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT)
            assert idle_s + interval_s * num_probes <= 45


def test_run_uses_uvloop_and_returns_the_result() -> None:
    async def main() -> str:
        return type(asyncio.get_running_loop()).__module__

    assert run(main()).startswith("uvloop")


@contextmanager
def no_more_descriptors() -> Iterator[None]:
    """The process cannot open any file while the block runs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("loop", LOOPS)
def test_73_without_descriptors_one_client_gets_503_and_none_is_lost(loop: str) -> None:
    with serving(answer_ok, loop=loop) as server:
        with server.connect() as before, socket.socket() as first, socket.socket() as second:
            before.send(CLOSE[:20])
            assert server.call(_wait_until(lambda: server.counters.open_connections == 1))
            with no_more_descriptors():
                for sock in (first, second):
                    sock.settimeout(PATIENCE_S)
                    sock.connect(("127.0.0.1", server.port))
                    sock.send(CLOSE)
                (refused,) = parse_answers(first.recv(65536))
                before.send(CLOSE[20:])
                assert before.answers()[0].status == 200
            assert parse_answers(second.recv(65536))[0].status == 200
        assert server.counters.accept_failures >= 1
    assert refused.status == 503 and refused.headers["retry-after"] == "1"


async def _wait_until(condition: Callable[[], bool]) -> bool:
    while not condition():
        await asyncio.sleep(0)
    return True


@pytest.mark.parametrize("loop", slow_but(LOOPS, "uvloop"))
def test_74_every_connection_of_a_burst_is_accepted(loop: str) -> None:
    with serving(answer_ok, loop=loop) as server:
        clients = [server.connect() for _ in range(400)]
        for client in clients:
            client.send(CLOSE)
        for client in clients:
            with client:
                assert client.answers()[0].body == b"ok"
