"""The bytes of a response, framed by hand: as h11 writes them, at a tenth of the cost."""

import secrets
from email.utils import formatdate
from enum import Enum
from http import HTTPStatus
from time import time

from llmsrv.asgi.types import RawHeaders
from llmsrv.errors import ApiError

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
STATUS_LINES = {s.value: f"HTTP/1.1 {s.value} {s.phrase}".encode() for s in HTTPStatus}
# The server writes these itself; of an application's own it only uses Content-Length.
FRAMING_HEADERS = frozenset((b"content-length", b"transfer-encoding", b"connection"))


class _State(Enum):
    WAITING = 1  # for http.response.start
    STARTED = 2  # the head is held back, to be sent in one write with the first body bytes
    BODY = 3
    COMPLETE = 4


class _Framing(Enum):
    NO_BODY = 1  # HEAD, 204, 304
    LENGTH = 2
    CHUNKED = 3
    UNTIL_CLOSE = 4  # all that HTTP/1.0 offers when the length is unknown


class ResponseWriter:
    """Turns the ASGI messages of one response into bytes.

    Raises RuntimeError if the application breaks the protocol: messages out of order, a header
    that would split the head, more or fewer bytes than its Content-Length.
    """

    def __init__(self, method: str, http_version: str) -> None:
        self._is_head = method == "HEAD"
        self._has_chunks = http_version == "1.1"
        self._state = _State.WAITING
        self._status = 0
        self._headers: RawHeaders = ()
        self._framing = _Framing.NO_BODY
        self._remaining = 0

    @property
    def is_started(self) -> bool:
        """True once the head has been returned: no other response can be sent then."""
        return self._state in (_State.BODY, _State.COMPLETE)

    @property
    def is_complete(self) -> bool:
        return self._state is _State.COMPLETE

    def start(self, status: int, headers: RawHeaders) -> None:
        if self._state is not _State.WAITING:
            raise RuntimeError("http.response.start was sent twice")
        self._status = status
        self._headers = headers
        self._state = _State.STARTED

    def body(self, data: bytes, more_body: bool, close: bool) -> bytes:
        """Returns the bytes of one http.response.body; the first are preceded by the head.

        close  announce in the head that the connection closes after this response
        """
        if self._state is _State.BODY and self._framing is _Framing.CHUNKED and more_body:
            return b"%x\r\n%b\r\n" % (len(data), data) if data else b""
        if self._state in (_State.WAITING, _State.COMPLETE):
            raise RuntimeError("http.response.body was sent before the start or after the end")
        head = b""
        if self._state is _State.STARTED:
            head = self._head(None if more_body else len(data), close)
            self._headers = ()
        framed = self._frame(data, more_body)
        self._state = _State.BODY if more_body else _State.COMPLETE
        return head + framed

    def _frame(self, data: bytes, more_body: bool) -> bytes:
        if self._framing is _Framing.NO_BODY:
            return b""
        if self._framing is _Framing.LENGTH:
            self._remaining -= len(data)
            if self._remaining < 0 or (self._remaining and not more_body):
                raise RuntimeError("the length of the body differs from its Content-Length")
            return data
        if self._framing is _Framing.UNTIL_CLOSE:
            return data
        chunk = b"%x\r\n%b\r\n" % (len(data), data) if data else b""
        return chunk if more_body else chunk + b"0\r\n\r\n"

    def _head(self, length: int | None, close: bool) -> bytes:
        """length is that of the whole body, or None if unknown."""
        lines = [STATUS_LINES.get(self._status) or b"HTTP/1.1 %d " % self._status]
        for name, value in self._headers:
            if name not in FRAMING_HEADERS:
                lines.append(b"%b: %b" % (name, value))
            elif name == b"content-length":
                length = int(value)
        lines.append(_date_line())
        lines += self._choose_framing(length)
        if close or self._framing is _Framing.UNTIL_CLOSE:
            lines.append(b"connection: close")
        head = b"\r\n".join(lines) + b"\r\n\r\n"
        if not head.count(b"\r") == head.count(b"\n") == len(lines) + 1 or b"\0" in head:
            raise RuntimeError("a response header contains a line end or NUL")
        return head

    def _choose_framing(self, length: int | None) -> list[bytes]:
        """Sets the framing and returns its header lines; HEAD gets the same lines as GET."""
        if self._status in (204, 304):
            return []
        self._remaining = length or 0
        if length is not None:
            framing, lines = _Framing.LENGTH, [b"content-length: %d" % length]
        elif self._has_chunks:
            framing, lines = _Framing.CHUNKED, [b"transfer-encoding: chunked"]
        else:
            framing, lines = _Framing.UNTIL_CLOSE, []
        self._framing = _Framing.NO_BODY if self._is_head else framing
        return lines


def error_response(error: ApiError, more_headers: RawHeaders = ()) -> bytes:
    """A complete response with the error object; the connection closes after it."""
    headers = [
        (b"content-type", b"application/json"),
        (b"x-request-id", secrets.token_hex(16).encode()),
    ]
    headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    headers += more_headers
    writer = ResponseWriter("GET", "1.1")
    writer.start(error.status, headers)
    return writer.body(error.body(), more_body=False, close=True)


_date_second = 0
_date = b""


def _date_line() -> bytes:
    """The Date header line, formatted once per second."""
    global _date_second, _date
    now = int(time())
    if now != _date_second:
        _date_second = now
        _date = b"date: " + formatdate(now, usegmt=True).encode()
    return _date
