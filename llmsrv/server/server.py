"""Serves an ASGI 3 application over HTTP/1.1: starting, draining, and the event loop.

Supports only ASGI's `http` protocol.  There are no websockets, and no lifespan: the caller starts
the application as well as the server.  The caller also handles signals.
"""

import asyncio
import socket
from collections.abc import Coroutine
from collections.abc import Sequence
from typing import Any
from typing import TypeVar

from llmsrv.asgi.types import ASGIApp
from llmsrv.server.connection import Connection
from llmsrv.server.connection import ErrorHeaders
from llmsrv.server.connection import ServerState
from llmsrv.server.listener import Acceptor
from llmsrv.server.settings import ServerCounters
from llmsrv.server.settings import ServerSettings

# How long applications have to notice that their clients were cut off.
ABORT_GRACE_S = 1.0

T = TypeVar("T")


class Server:
    """An application on listening sockets (see listener.bind), from start() to drain()."""

    def __init__(
        self,
        app: ASGIApp,
        sockets: Sequence[socket.socket],
        settings: ServerSettings,
        error_headers: ErrorHeaders = lambda origin: (),
    ) -> None:
        """error_headers: for errors that the server answers without the application, such as 431;
        gets the request's Origin, None without one."""
        self.counters = ServerCounters()
        self._app = app
        self._sockets = sockets
        self._settings = settings
        self._error_headers = error_headers
        self._server_state: ServerState
        self._acceptor: Acceptor
        self._attaching: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server_state = ServerState(
            self._app, self._settings, self.counters, self._error_headers
        )
        self._acceptor = Acceptor(
            self._sockets, self._connect, self.counters, self._settings.accept_pause_s
        )

    async def drain(self, grace_s: float) -> None:
        """Stops accepting, closes idle connections, and lets running requests finish.

        Requests still running after grace_s are cut off; their applications receive
        http.disconnect.  May be cancelled and called again with a shorter grace period.
        """
        state = self._server_state
        state.is_draining = True
        self._acceptor.close()
        if self._attaching:
            await asyncio.wait(self._attaching)
        for connection in list(state.connections):
            connection.close_if_idle()
        state.check_all_gone()
        if not await self._wait_all_gone(grace_s):
            for connection in list(state.connections):
                connection.abort()
            await self._wait_all_gone(ABORT_GRACE_S)

    async def _wait_all_gone(self, timeout_s: float) -> bool:
        try:
            await asyncio.wait_for(self._server_state.all_gone.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def _connect(self, sock: socket.socket) -> None:
        task = asyncio.ensure_future(self._attach(sock))
        self._attaching.add(task)
        task.add_done_callback(self._attaching.discard)

    async def _attach(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(lambda: Connection(self._server_state), sock)
        except OSError:
            sock.close()  # the client left before we got to it


def run(main: Coroutine[Any, Any, T]) -> T:
    """Runs main on uvloop if it is installed, else on asyncio's own loop."""
    try:
        from uvloop import new_event_loop
    except ImportError:
        return asyncio.run(main)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main)
