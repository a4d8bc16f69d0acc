"""Responses whose whole body is known.  Streams are in sse.py."""

from typing import Protocol

from llmsrv.asgi.dialect import Dialect
from llmsrv.asgi.dialect import OPENAI
from llmsrv.asgi.types import RawHeaders
from llmsrv.asgi.types import Send
from llmsrv.errors import ApiError


class Answer(Protocol):
    """What a handler returns: something that can send itself."""

    async def __call__(self, send: Send) -> None: ...


class Response:
    """A status, headers and a body.  Statuses without a body (204, 304) get no Content-Type or
    Content-Length."""

    def __init__(
        self,
        status: int = 200,
        body: bytes = b"",
        content_type: str = "application/json",
        headers: RawHeaders = (),
    ) -> None:
        self.status = status
        self.body = body
        self.headers = list(headers)
        if status not in (204, 304):
            self.headers.append((b"content-type", content_type.encode("latin-1")))
            self.headers.append((b"content-length", b"%d" % len(body)))

    async def __call__(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status, "headers": self.headers}
        await send(start)
        await send({"type": "http.response.body", "body": self.body, "more_body": False})


def error_response(error: ApiError, dialect: Dialect = OPENAI) -> Response:
    """The error in the dialect's shape, with the error's own headers."""
    headers = [(k.lower().encode("latin-1"), v.encode("latin-1")) for k, v in error.headers.items()]
    return Response(error.status, dialect.error_body(error), dialect.content_type, headers)
