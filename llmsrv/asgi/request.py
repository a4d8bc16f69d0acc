"""A request as its handler sees it.  Knows nothing about sockets, routes or JSON."""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Any
from urllib.parse import quote

from llmsrv.asgi.types import ClientDisconnected
from llmsrv.asgi.types import ON_DISCONNECT
from llmsrv.asgi.types import RawHeaders
from llmsrv.asgi.types import Receive
from llmsrv.asgi.types import Scope
from llmsrv.errors import ApiError


PATH_CHARS = "/!$&'()*+,:;=@"  # need no percent-encoding in a path, RFC 3986 section 3.3


class Headers:
    """A request's header fields by name, in any case; values are decoded as latin-1."""

    def __init__(self, raw: RawHeaders) -> None:
        self._raw = raw

    def get(self, name: str) -> str | None:
        """The first field with that name, or None."""
        key = name.lower().encode("latin-1")
        return next((value.decode("latin-1") for field, value in self._raw if field == key), None)

    def getlist(self, name: str) -> list[str]:
        """All fields with that name, in the order they were sent."""
        key = name.lower().encode("latin-1")
        return [value.decode("latin-1") for field, value in self._raw if field == key]


class Request:
    """One request.

    raw_path     the path as sent, still percent-encoded, without the query
    client       the peer's address and port, None if it has none
    state        the application's own data about this request
    path_params  the route's parameters from the path, decoded
    """

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self.scope = scope
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.raw_path: bytes = scope.get("raw_path") or quote(self.path, PATH_CHARS).encode()
        self.headers = Headers(scope["headers"])
        self.client: tuple[str, int] | None = scope.get("client")
        self.state: dict[str, Any] = {}
        self.path_params: dict[str, str] = {}
        self._receive = receive

    async def body(self, limit_bytes: int) -> bytes:
        """The whole body.  Call it once: the request may wait for long, and does not keep it.

        Raises ApiError 413 as soon as the body is known to exceed limit_bytes, and
        ClientDisconnected if the client goes away first.
        """
        if int(self.headers.get("content-length") or 0) > limit_bytes:
            raise _body_too_large(limit_bytes)
        pieces: list[bytes] = []
        size = 0
        more_body = True
        while more_body:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnected
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            if size > limit_bytes:
                raise _body_too_large(limit_bytes)
            more_body = message.get("more_body", False)
        return b"".join(pieces)

    def cancel_on_disconnect(self) -> "CancelOnDisconnect":
        """A context manager that cancels its block when the client goes away; ClientDisconnected is
        then raised from it.

        Enter it after body(): it discards the rest of the body.
        """
        return CancelOnDisconnect(self.scope.get(ON_DISCONNECT), self._receive)


class CancelOnDisconnect:
    __slots__ = ("_register", "_receive", "_task", "_watching", "_is_gone", "_has_left")

    def __init__(self, register: Callable[[object], None] | None, receive: Receive) -> None:
        """register: what the scope has for ON_DISCONNECT"""
        self._register = register
        self._receive = receive
        self._watching: asyncio.Task[None] | None = None
        self._is_gone = False
        self._has_left = False

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        if self._register:
            self._register(self._leave_soon)
        else:
            self._watching = asyncio.create_task(self._watch())

    def __exit__(
        self,
        type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._has_left = True
        if self._register:
            self._register(None)
        elif self._watching:
            self._watching.cancel()
        # If the task was also cancelled from elsewhere, that must propagate (as in
        # asyncio.timeout).
        if isinstance(error, asyncio.CancelledError) and self._is_gone:
            if self._task.uncancel() == 0:
                raise ClientDisconnected from None

    def _leave_soon(self) -> None:
        # Soon, not now: a task that is running cannot be cancelled before its next await.
        self._task.get_loop().call_soon(self._leave)

    def _leave(self) -> None:
        if not self._has_left:
            self._is_gone = True
            self._task.cancel()

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        # Not in a done callback: that could run after the block has been left.
        self._leave()


def _body_too_large(limit_bytes: int) -> ApiError:
    return ApiError(413, f"The request body is larger than the {limit_bytes} bytes allowed.")
