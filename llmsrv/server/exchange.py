"""One request and its response: the receive() and send() of an ASGI application."""

from collections.abc import Callable
from typing import Protocol

from llmsrv.asgi.types import Message
from llmsrv.asgi.types import Scope
from llmsrv.errors import ApiError
from llmsrv.server.head import RequestHead
from llmsrv.server.response import CONTINUE
from llmsrv.server.response import ResponseWriter
from llmsrv.server.timing import Flag

DISCONNECT: Message = {"type": "http.disconnect"}


class Wire(Protocol):
    """What an exchange needs from its connection.

    buffer          what the client sent after the head
    changed         set when the buffer has grown
    writable        clear while too much of the response waits to be sent
    may_keep_alive  whether the connection may serve another request
    """

    buffer: bytearray
    changed: Flag
    writable: Flag

    @property
    def may_keep_alive(self) -> bool: ...

    def write(self, data: bytes) -> None: ...

    def want_body(self) -> None:
        """The application is waiting for the body: keep reading, and start the body deadline."""

    def refuse(self, error: ApiError) -> None:
        """The body is malformed: send the error if no response has started, and close."""


class Exchange:
    """receive() and send() of one request.

    After disconnect(), receive() returns http.disconnect and send() does nothing.
    """

    def __init__(self, wire: Wire, head: RequestHead, scope: Scope) -> None:
        self.scope = scope
        self.response = ResponseWriter(head.method, head.http_version)
        self.keep_alive = head.keep_alive
        self.body_bytes = 0
        self._wire = wire
        self._body = head.body
        self._pending = b""  # body bytes that were read but not yet received by the application
        self._has_received_all = False
        self._awaits_continue = head.expects_continue
        self._is_disconnected = False
        self._disconnect_callback: Callable[[], object] | None = None
        self._ping = b""

    @property
    def origin(self) -> bytes | None:
        return next((value for name, value in self.scope["headers"] if name == b"origin"), None)

    async def receive(self) -> Message:
        while not (self._is_disconnected or self.response.is_complete):
            # Clear before looking, not after: _maybe_body may find a bad body, which ends the
            # exchange and sets the event.
            self._wire.changed.clear()
            if not self._has_received_all and (message := self._maybe_body()):
                return message
            await self._wire.changed.wait()
        return DISCONNECT

    async def send(self, message: Message) -> None:
        if self._is_disconnected:
            return
        if message["type"] == "http.response.body":
            data = self._frame(message.get("body", b""), message.get("more_body", False))
            if data:
                self._wire.write(data)
            if self.response.is_complete:
                self._wire.changed.set()  # receive() may be waiting for the disconnect
            if not self._wire.writable.is_set():
                await self._wire.writable.wait()
        elif message["type"] == "http.response.start":
            self.response.start(message["status"], message.get("headers", ()))
            self._ping = message.get("ping", b"")
        else:
            raise RuntimeError(f"unknown ASGI message {message['type']}")

    def on_disconnect(self, callback: Callable[[], object] | None) -> None:
        """See ON_DISCONNECT."""
        self._disconnect_callback = callback
        if callback and self._is_disconnected:
            callback()

    def disconnect(self) -> None:
        if not self._is_disconnected and self._disconnect_callback:
            self._disconnect_callback()
        self._is_disconnected = True
        self._wire.changed.set()
        self._wire.writable.set()

    def ping(self) -> None:
        """Writes a no-op to a stream that has begun; a client that left answers with a reset."""
        if self._ping and self.response.is_started and not self.response.is_complete:
            self._wire.write(self._frame(self._ping, more_body=True))

    def has_whole_body(self) -> bool:
        """True if the client has sent the whole body; takes what has arrived from the buffer."""
        self._read_body()
        return self._body.is_complete

    def _frame(self, body: bytes, more_body: bool) -> bytes:
        response = self.response
        if not response.is_started:
            # A response that does not wait for the body ends the connection: the bytes that follow
            # are body, and dropping them is cheaper than reading them.
            self.keep_alive = (
                self.keep_alive and self._wire.may_keep_alive and self.has_whole_body()
            )
            if self._is_disconnected:
                return b""
        return response.body(body, more_body, close=not self.keep_alive)

    def _maybe_body(self) -> Message | None:
        """Returns the next part of the body, or None if it has not arrived."""
        self._read_body()
        if self._is_disconnected:
            return None
        if not self._pending and not self._body.is_complete:
            if self._awaits_continue and not self.response.is_started:
                self._awaits_continue = False
                self._wire.write(CONTINUE)
            self._wire.want_body()
            return None
        body, self._pending = self._pending, b""
        self._has_received_all = self._body.is_complete
        return {"type": "http.request", "body": body, "more_body": not self._body.is_complete}

    def _read_body(self) -> None:
        if self._body.is_complete or self._is_disconnected:
            return
        try:
            data = self._body.read(self._wire.buffer)
        except ApiError as error:
            self._wire.refuse(error)
            return
        if data:
            self._awaits_continue = False
            self.body_bytes += len(data)
            self._pending += data
