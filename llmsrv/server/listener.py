"""Binds listening sockets and accepts connections, even when file descriptors run out."""

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Callable
from collections.abc import Sequence

from llmsrv.errors import ApiError
from llmsrv.errors import StartupError
from llmsrv.server.response import error_response
from llmsrv.server.settings import ServerCounters
from llmsrv.server.timing import LogRateLimit

log = logging.getLogger("llmsrv.server")

BACKLOG = 4096
# Limited so that a burst of new connections does not starve the existing ones.
MAX_ACCEPTS_PER_TURN = 64
# A peer that vanished without a FIN is noticed in at most 45 s: after 15 s of silence the kernel
# probes it, and 30 s without an answer end the connection (RFC 9293 section 3.8.4, RFC 5482).  This
# matters while there is nothing to send, as for a whole answer that is still being computed.
KEEP_ALIVE_IDLE_S = 15
KEEP_ALIVE_INTERVAL_S = 5
KEEP_ALIVE_PROBES = 6
USER_TIMEOUT_MS = 30_000  # also for a peer that reads nothing
# Accepted sockets inherit these; the names differ between systems.
TCP_OPTIONS = {
    "TCP_NODELAY": 1,
    "TCP_KEEPIDLE": KEEP_ALIVE_IDLE_S,  # Linux
    "TCP_KEEPALIVE": KEEP_ALIVE_IDLE_S,  # macOS
    "TCP_KEEPINTVL": KEEP_ALIVE_INTERVAL_S,
    "TCP_KEEPCNT": KEEP_ALIVE_PROBES,
    "TCP_USER_TIMEOUT": USER_TIMEOUT_MS,  # Linux
}


def bind(host: str, port: int) -> list[socket.socket]:
    """Listens on every address of host, all on the same port; port 0 picks a free one.

    Raises StartupError, with a suggestion, if the port is taken or the host is not local.
    """
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        raise StartupError(f"cannot listen on {host!r}: {error.strerror}; try --host 127.0.0.1")
    sockets: list[socket.socket] = []
    try:
        for family, _, _, _, address in dict.fromkeys(found):
            sockets.append(_listen(family, (address[0], port, *address[2:])))
            port = sockets[0].getsockname()[1]
    except OSError as error:
        for sock in sockets:
            sock.close()
        raise StartupError(_advice(error, host, port)) from None
    return sockets


def _listen(family: int, address: tuple[object, ...]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in TCP_OPTIONS.items():
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        sock.setblocking(False)
        sock.bind(address)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _advice(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is in use; try --port {port % 65535 + 1}"
    if error.errno == errno.EACCES:
        return f"port {port} needs privileges; try --port 8000"
    return f"cannot listen on {host!r} port {port}: {error.strerror}; try --host 127.0.0.1"


class Acceptor:
    """Passes each accepted socket to `on_accept`.

    We do not use loop.create_server: on EMFILE, asyncio stops accepting for a second and uvloop
    silently closes the waiting connections.  Here a descriptor kept in reserve lets us send one
    waiting client a 503.  The others wait in the backlog, and open connections are not affected.
    """

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        on_accept: Callable[[socket.socket], None],
        counters: ServerCounters,
        pause_s: float,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._sockets = list(sockets)
        self._on_accept = on_accept
        self._counters = counters
        self._pause_s = pause_s
        self._reserve_fd = os.open(os.devnull, os.O_RDONLY)
        self._log_limit = LogRateLimit()
        for sock in self._sockets:
            self._loop.add_reader(sock, self._accept, sock)

    def close(self) -> None:
        """Stops accepting and closes the listening sockets; may be called again."""
        for sock in self._sockets:
            self._loop.remove_reader(sock)
            sock.close()
        if self._sockets:
            os.close(self._reserve_fd)
        self._sockets.clear()

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(MAX_ACCEPTS_PER_TURN):
            try:
                sock, _ = listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionAbortedError:
                continue
            except OSError as error:
                self._pause(listener, error)
                return
            sock.setblocking(False)
            self._on_accept(sock)

    def _pause(self, listener: socket.socket, error: OSError) -> None:
        self._counters.accept_failures += 1
        if self._log_limit.allows_line():
            log.error("cannot accept connections: %s", error.strerror)
        if error.errno in (errno.EMFILE, errno.ENFILE):
            self._refuse_one(listener)
        self._loop.remove_reader(listener)
        self._loop.call_later(self._pause_s, self._resume, listener)

    def _resume(self, listener: socket.socket) -> None:
        if listener in self._sockets:
            self._loop.add_reader(listener, self._accept, listener)

    def _refuse_one(self, listener: socket.socket) -> None:
        error = ApiError(
            503,
            "The server has too many connections.",
            code="server_is_overloaded",
            headers={"Retry-After": "1"},
        )
        os.close(self._reserve_fd)
        try:
            with listener.accept()[0] as sock:
                sock.setblocking(False)
                sock.send(error_response(error))
                sock.shutdown(socket.SHUT_WR)
                # Closing with unread bytes would reset the connection and lose the response.
                sock.recv(65536)
        except OSError:
            pass
        finally:
            self._reserve_fd = os.open(os.devnull, os.O_RDONLY)
