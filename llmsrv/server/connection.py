"""One connection: requests in, one after the other, responses out in the same order.

                 a whole head                    the application returned, kept alive
    HEAD -----------------------> RUNNING ------------------------------------------> HEAD
      | refused, idle too long       | refused, not kept alive, broken off
      +------------------------------+------> LINGERING -------> CLOSED
                                              FIN sent, input dropped until the client's FIN

Bytes wait in one buffer until the head, the body or the next request takes them; while it is full
nothing is read, and TCP slows the client down.
"""

import asyncio
import logging
from enum import Enum
from typing import cast

from llmsrv.asgi.types import ASGIApp
from llmsrv.asgi.types import ClientDisconnected
from llmsrv.asgi.types import Scope
from llmsrv.asgi.types import StreamBroken
from llmsrv.errors import ApiError
from llmsrv.server.exchange import Exchange
from llmsrv.server.head import HeadReader
from llmsrv.server.head import RequestHead
from llmsrv.server.response import error_bytes
from llmsrv.server.settings import ServerCounters
from llmsrv.server.settings import ServerSettings
from llmsrv.server.timing import Deadline
from llmsrv.server.timing import LogBrake

log = logging.getLogger("llmsrv.server")

ASGI = {"version": "3.0", "spec_version": "2.4"}


class Context:
    """What the connections of one server share."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, counters: ServerCounters) -> None:
        self.app = app
        self.settings = settings
        self.counters = counters
        self.loop = asyncio.get_running_loop()
        self.is_draining = False
        self.connections: set[Connection] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self.all_gone = asyncio.Event()  # set once draining and nothing is left
        # The loop fills it and the connection empties it in one go, so all can read into the same.
        self.read_buffer = memoryview(bytearray(settings.read_ahead_bytes))
        self.refusals_brake = LogBrake()

    def note_gone(self) -> None:
        if self.is_draining and not self.connections and not self.tasks:
            self.all_gone.set()


class _Phase(Enum):
    HEAD = 1
    RUNNING = 2
    LINGERING = 3
    CLOSED = 4


class Connection(asyncio.BufferedProtocol):
    """The loop's protocol of one socket, and the Wire of the exchange that is running."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._settings = context.settings

        # While the connection lasts.
        self.buffer = bytearray()
        self.changed = asyncio.Event()
        self.writable = asyncio.Event()
        self.writable.set()
        self._transport: asyncio.Transport
        self._client: tuple[str, int] | None = None
        self._server: tuple[str, int] | None = None
        self._phase = _Phase.HEAD
        self._head_reader = HeadReader(context.settings)
        self._read_deadline = Deadline(context.loop, self._on_read_deadline)
        self._write_deadline = Deadline(context.loop, self._on_write_deadline)
        self._is_reading = True
        self._has_eof = False
        self._written_bytes = 0
        self._drained_bytes = 0  # when the write deadline was last set
        self._lingered_bytes = 0

        # For each request anew.
        self._exchange: Exchange | None = None
        self._head_began = True  # the first head's time runs from the connection's start
        self._body_began_at: float | None = None

    # What the loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it
        self._transport.set_write_buffer_limits(high=self._settings.write_high_water_bytes)
        self._client = _address(transport.get_extra_info("peername"))
        self._server = _address(transport.get_extra_info("sockname"))
        self._context.connections.add(self)
        self._context.counters.connections += 1
        self._context.counters.open_connections += 1
        self._read_deadline.set(self._settings.header_timeout_s)
        self.close_if_idle()

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._phase is not _Phase.LINGERING and self.buffer:
            return self._context.read_buffer[: self._settings.read_ahead_bytes - len(self.buffer)]
        return self._context.read_buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._phase is _Phase.LINGERING:
            self._lingered_bytes += nbytes
            if self._lingered_bytes > self._settings.linger_bytes:
                self.abort()
            return
        self.buffer += self._context.read_buffer[:nbytes]
        if len(self.buffer) >= self._settings.read_ahead_bytes:
            self._pause_reading()
        if self._phase is _Phase.HEAD:
            self._maybe_start_request()
        else:
            self.changed.set()

    def eof_received(self) -> bool:
        """True to go on writing: the request that is running is complete.

        The client may be gone for good or have closed its half only.  A reset will tell when a
        stream is written to, which is done at once and once more; other answers get a moment's
        grace.
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
            self._context.counters.client_disconnected += 1
            self._exchange.disconnect()
        self._phase = _Phase.CLOSED
        self._read_deadline.close()
        self._write_deadline.close()
        self._context.counters.open_connections -= 1
        self._context.connections.discard(self)
        self._context.note_gone()

    def pause_writing(self) -> None:
        self.writable.clear()
        self._watch_drain()

    def resume_writing(self) -> None:
        self.writable.set()
        if self._phase is _Phase.RUNNING:
            self._write_deadline.clear()

    # What the server calls.

    def close_if_idle(self) -> None:
        """Closes while draining, unless a request is running or on its way in.

        Without lingering: nothing was sent that could be lost, and whoever stops a server should
        not wait for clients that keep a connection in store.
        """
        if self._context.is_draining and self._phase is _Phase.HEAD and not self.buffer:
            self._transport.close()

    def abort(self) -> None:
        self._transport.abort()

    # What the exchange calls.

    @property
    def may_keep_alive(self) -> bool:
        return not self._context.is_draining

    def write(self, data: bytes) -> None:
        self._written_bytes += len(data)
        self._transport.write(data)

    def want_body(self) -> None:
        if self._has_eof:
            self._linger()
            return
        if self._body_began_at is None:
            self._body_began_at = self._context.loop.time()
            self._read_deadline.set(self._settings.body_timeout_s)
        self._resume_reading()

    def refuse(self, error: ApiError) -> None:
        self._context.counters.refused_requests += 1
        if self._context.refusals_brake.is_open():
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
        self._context.counters.requests += 1
        self._phase = _Phase.RUNNING
        self._body_began_at = None
        self._read_deadline.clear()
        if self._has_eof:
            self._read_deadline.set(self._settings.half_close_grace_s)
        self._exchange = Exchange(self, head, self._scope(head))
        task = self._context.loop.create_task(self._run(self._exchange))
        self._context.tasks.add(task)

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
            await self._context.app(exchange.scope, exchange.receive, exchange.send)
        except (ClientDisconnected, StreamBroken):
            pass
        except Exception:
            self._context.counters.app_errors += 1
            path = exchange.scope["raw_path"].decode("latin-1")
            log.exception("%s %s failed", exchange.scope["method"], path)
        finally:
            self._context.tasks.discard(task)
            self._context.note_gone()
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

    # The end.

    def _answer_and_close(self, error: ApiError) -> None:
        """Closes with an error answer, or without one inside a response: that one breaks off."""
        if not self._exchange or not self._exchange.response.is_started:
            self.write(error_bytes(error))
        self._linger()

    def _linger(self) -> None:
        """Sends what is written and FIN, and drops input until the client's FIN.

        Not abort(), even to break a stream off: that would drop the error event with the rest.
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
                self.abort()  # the client has reset it, and the loop has yet to tell
        self._watch_drain()

    # Deadlines and flow.

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
                exchange.ping()  # fails, if the one that met the FIN was answered with a reset
            else:
                self.abort()
        elif self._body_began_at is not None and not exchange.has_whole_body():
            earned_s = exchange.body_bytes / self._settings.min_rate_bytes
            due_at = self._body_began_at + self._settings.body_timeout_s + earned_s
            left_s = due_at - self._context.loop.time()
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
        least_bytes = self._settings.min_rate_bytes * self._settings.write_stall_timeout_s
        if waiting_bytes and drained_bytes < least_bytes:
            self._context.counters.client_stalled += 1
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
    """Host and port of a socket's name; None for what has none, as a Unix socket."""
    return (name[0], name[1]) if isinstance(name, tuple) else None
