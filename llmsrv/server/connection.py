"""One connection: reads requests one at a time and writes the responses in the same order.

                complete head                   the application returned, kept alive
    HEAD -----------------------> RUNNING ------------------------------------------> HEAD
      | refused, idle too long       | refused, not kept alive, broken off
      +------------------------------+------> LINGERING -------> CLOSED
                                              FIN sent, input dropped until the client's FIN

Bytes wait in one buffer until the head, the body or the next request takes them.  While the buffer
is full nothing is read, and TCP flow control slows the client down.
"""

import asyncio
import logging
from collections.abc import Callable
from enum import Enum
from typing import cast

from llmsrv.asgi.types import ASGIApp
from llmsrv.asgi.types import ClientDisconnected
from llmsrv.asgi.types import ON_DISCONNECT
from llmsrv.asgi.types import RawHeaders
from llmsrv.asgi.types import Scope
from llmsrv.asgi.types import StreamBroken
from llmsrv.errors import ApiError
from llmsrv.server.exchange import Exchange
from llmsrv.server.head import HeadReader
from llmsrv.server.head import RequestHead
from llmsrv.server.head import find_origin
from llmsrv.server.response import error_response
from llmsrv.server.settings import ServerCounters
from llmsrv.server.settings import ServerSettings
from llmsrv.server.timing import Flag
from llmsrv.server.timing import LogRateLimit
from llmsrv.timing import Deadline
from llmsrv.timing import Timer

log = logging.getLogger("llmsrv.server")

ASGI = {"version": "3.0", "spec_version": "2.4"}

# Origin of a request, None without one -> headers of an error that the server itself answers.
ErrorHeaders = Callable[[bytes | None], RawHeaders]


class ServerState:
    """What the connections of one server share."""

    def __init__(
        self,
        app: ASGIApp,
        settings: ServerSettings,
        counters: ServerCounters,
        error_headers: ErrorHeaders = lambda origin: (),
    ) -> None:
        self.app = app
        self.error_headers = error_headers
        self.settings = settings
        self.counters = counters
        self.loop = asyncio.get_running_loop()
        self.timer = Timer()
        self.is_draining = False
        self.connections: set[Connection] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self.all_gone = asyncio.Event()  # set when draining and nothing is left
        # Shared by all connections: each copies its bytes out as soon as the loop has read them.
        self.read_buffer = memoryview(bytearray(settings.read_ahead_bytes))
        self.refusal_log_limit = LogRateLimit()

    def check_all_gone(self) -> None:
        if self.is_draining and not self.connections and not self.tasks:
            self.all_gone.set()


class _Phase(Enum):
    HEAD = 1
    RUNNING = 2
    LINGERING = 3
    CLOSED = 4


class Connection(asyncio.BufferedProtocol):
    """The asyncio protocol of one socket, and the Wire of the running exchange."""

    def __init__(self, state: ServerState) -> None:
        self._server_state = state
        self._settings = state.settings

        # Per connection.
        self.buffer = bytearray()
        self.changed = Flag()
        self.writable = Flag(is_set=True)
        self._transport: asyncio.Transport
        self._client: tuple[str, int] | None = None
        self._server: tuple[str, int] | None = None
        self._phase = _Phase.HEAD
        self._head_reader = HeadReader(state.settings)
        self._read_deadline = Deadline(state.timer, self._on_read_deadline)
        self._write_deadline = Deadline(state.timer, self._on_write_deadline)
        self._is_reading = True
        self._has_eof = False
        self._written_bytes = 0
        self._drained_bytes = 0  # when the write deadline was last set
        self._lingered_bytes = 0

        # Per request.
        self._exchange: Exchange | None = None
        self._head_began = True  # the first head is timed from the start of the connection
        self._body_began_at: float | None = None

    # Called by the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not a subclass
        self._transport.set_write_buffer_limits(high=self._settings.write_high_water_bytes)
        self._client = _address(transport.get_extra_info("peername"))
        self._server = _address(transport.get_extra_info("sockname"))
        self._server_state.connections.add(self)
        self._server_state.counters.connections += 1
        self._server_state.counters.open_connections += 1
        self._read_deadline.set(self._settings.header_timeout_s)
        self.close_if_idle()

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._phase is not _Phase.LINGERING and self.buffer:
            room_bytes = self._settings.read_ahead_bytes - len(self.buffer)
            return self._server_state.read_buffer[:room_bytes]
        return self._server_state.read_buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._phase is _Phase.LINGERING:
            self._lingered_bytes += nbytes
            if self._lingered_bytes > self._settings.linger_bytes:
                self.abort()
            return
        self.buffer += self._server_state.read_buffer[:nbytes]
        if len(self.buffer) >= self._settings.read_ahead_bytes:
            self._pause_reading()
        if self._phase is _Phase.HEAD:
            self._maybe_start_request()
        else:
            self.changed.set()

    def eof_received(self) -> bool:
        """Returns True to keep the connection open for writing.

        That is the case while a request runs whose body has arrived.  The client may have left, or
        may only have closed its half.  If a stream has begun, a ping is written now and again
        after half_close_grace_s: a client that has left answers with a reset.  A response that
        has not begun gets that time to begin.
        """
        self._has_eof = True
        exchange = self._exchange
        if self._phase is not _Phase.RUNNING or not exchange or not exchange.has_whole_body():
            return False
        self._read_deadline.set(self._settings.half_close_grace_s)
        exchange.ping()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        if self._phase is _Phase.RUNNING and self._exchange:
            self._server_state.counters.client_disconnected += 1
            self._exchange.disconnect()
        self._phase = _Phase.CLOSED
        self._read_deadline.close()
        self._write_deadline.close()
        self._server_state.counters.open_connections -= 1
        self._server_state.connections.discard(self)
        self._server_state.check_all_gone()

    def pause_writing(self) -> None:
        self.writable.clear()
        self._watch_drain()

    def resume_writing(self) -> None:
        self.writable.set()
        if self._phase is _Phase.RUNNING:
            self._write_deadline.clear()

    # Called by the server.

    def close_if_idle(self) -> None:
        """Closes the connection if draining, unless a request is running or arriving.

        This needs no lingering: nothing was sent that could be lost, and a server that stops
        should not wait for clients that hold connections in a pool.
        """
        if self._server_state.is_draining and self._phase is _Phase.HEAD and not self.buffer:
            self._transport.close()

    def abort(self) -> None:
        self._transport.abort()

    # Called by the exchange.

    @property
    def may_keep_alive(self) -> bool:
        return not self._server_state.is_draining

    def write(self, data: bytes) -> None:
        self._written_bytes += len(data)
        self._transport.write(data)

    def want_body(self) -> None:
        if self._has_eof:
            self._linger()
            return
        if self._body_began_at is None:
            self._body_began_at = self._server_state.loop.time()
            self._read_deadline.set(self._settings.body_timeout_s)
        self._resume_reading()

    def refuse(self, error: ApiError) -> None:
        self._server_state.counters.refused_requests += 1
        if self._server_state.refusal_log_limit.allows_line():
            log.info("refused %s: %d %s", self._client, error.status, error.message)
        self._answer_and_close(error)

    # Requests.

    def _maybe_start_request(self) -> None:
        try:
            head = self._head_reader.read(self.buffer)
        except ApiError as error:
            self.refuse(error)
            return
        if head:
            self._start_request(head)
        elif self._has_eof:
            self._linger()
        elif self.buffer and not self._head_began:
            self._head_began = True
            self._read_deadline.set(self._settings.header_timeout_s)

    def _start_request(self, head: RequestHead) -> None:
        self._server_state.counters.requests += 1
        self._phase = _Phase.RUNNING
        self._body_began_at = None
        self._read_deadline.clear()
        if self._has_eof:
            self._read_deadline.set(self._settings.half_close_grace_s)
        exchange = self._exchange = Exchange(self, head, self._scope(head))
        exchange.scope[ON_DISCONNECT] = exchange.on_disconnect
        task = self._server_state.loop.create_task(self._run(exchange))
        self._server_state.tasks.add(task)

    def _scope(self, head: RequestHead) -> Scope:
        return {
            "type": "http",
            "asgi": ASGI,
            "http_version": head.http_version,
            "method": head.method,
            "scheme": "http",
            "path": head.path,
            "raw_path": head.raw_path,
            "query_string": head.query_string,
            "root_path": "",
            "headers": head.headers,
            "client": self._client,
            "server": self._server,
            "state": {},
        }

    async def _run(self, exchange: Exchange) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            await self._server_state.app(exchange.scope, exchange.receive, exchange.send)
        except (ClientDisconnected, StreamBroken):
            pass
        except Exception:
            self._server_state.counters.app_errors += 1
            path = exchange.scope["raw_path"].decode("latin-1")
            log.exception("%s %s failed", exchange.scope["method"], path)
        finally:
            del exchange.scope[ON_DISCONNECT]  # or scope and exchange would refer to each other
            self._server_state.tasks.discard(task)
            self._server_state.check_all_gone()
            if self._phase is _Phase.RUNNING:
                self._end_request(exchange)

    def _end_request(self, exchange: Exchange) -> None:
        response = exchange.response
        if not response.is_started:
            self._answer_and_close(ApiError(500, "The server had an error. Sorry about that!"))
        elif not response.is_complete or not exchange.keep_alive:
            self._linger()
        else:
            self._await_request()

    def _await_request(self) -> None:
        self._phase = _Phase.HEAD
        self._exchange = None
        self._head_began = False
        self._read_deadline.set(self._settings.keep_alive_timeout_s)
        if self.buffer or self._has_eof:
            self._maybe_start_request()
        self._resume_reading()
        self.close_if_idle()

    # Closing.

    def _answer_and_close(self, error: ApiError) -> None:
        """Sends the error and closes; a response that has started is just broken off."""
        if not self._exchange or not self._exchange.response.is_started:
            origin = self._exchange.origin if self._exchange else find_origin(self.buffer)
            self.write(error_response(error, self._server_state.error_headers(origin)))
        self._linger()

    def _linger(self) -> None:
        """Sends pending output and FIN, then drops input until the client's FIN.

        Does not abort(), even to break off a stream: that would discard a pending error event.
        """
        if self._exchange:
            self._exchange.disconnect()
        self._phase = _Phase.LINGERING
        self.buffer.clear()
        if self._has_eof:
            self._transport.close()
        elif not self._transport.is_closing():
            self._resume_reading()
            self._read_deadline.set(self._settings.linger_timeout_s)
            try:
                self._transport.write_eof()
            except OSError:
                self.abort()  # the client sent a reset that the loop has not reported yet
        self._watch_drain()

    # Deadlines and flow control.

    def _on_read_deadline(self) -> None:
        if self._phase is _Phase.HEAD:
            if self.buffer:
                self.refuse(ApiError(408, "The request head took too long."))
            else:
                self._linger()
        elif self._phase is _Phase.RUNNING and self._exchange:
            self._check_body_or_grace(self._exchange)
        elif self._phase is _Phase.LINGERING:
            if self._transport.get_write_buffer_size():
                self._read_deadline.set(self._settings.linger_timeout_s)
            else:
                self.abort()

    def _check_body_or_grace(self, exchange: Exchange) -> None:
        if self._has_eof:
            if exchange.response.is_started:
                exchange.ping()  # fails if the client answered the first ping with a reset
            else:
                self.abort()
        elif self._body_began_at is not None and not exchange.has_whole_body():
            earned_s = exchange.body_bytes / self._settings.min_rate_bytes
            due_at = self._body_began_at + self._settings.body_timeout_s + earned_s
            left_s = due_at - self._server_state.loop.time()
            if left_s > 0:
                self._read_deadline.set(left_s)
            else:
                self.refuse(ApiError(408, "The request body took too long."))

    def _watch_drain(self) -> None:
        self._drained_bytes = self._written_bytes - self._transport.get_write_buffer_size()
        self._write_deadline.set(self._settings.write_stall_timeout_s)

    def _on_write_deadline(self) -> None:
        waiting_bytes = self._transport.get_write_buffer_size()
        drained_bytes = self._written_bytes - waiting_bytes - self._drained_bytes
        min_bytes = self._settings.min_rate_bytes * self._settings.write_stall_timeout_s
        if waiting_bytes and drained_bytes < min_bytes:
            self._server_state.counters.client_stalled += 1
            self.abort()
        elif waiting_bytes:
            self._watch_drain()

    def _pause_reading(self) -> None:
        if self._is_reading and not self._transport.is_closing():
            self._is_reading = False
            self._transport.pause_reading()

    def _resume_reading(self) -> None:
        has_room = len(self.buffer) < self._settings.read_ahead_bytes
        if has_room and not self._is_reading and not self._transport.is_closing():
            self._is_reading = True
            self._transport.resume_reading()


def _address(name: object) -> tuple[str, int] | None:
    """Host and port of a socket name; None if it has none, as for a Unix socket."""
    return (name[0], name[1]) if isinstance(name, tuple) else None
