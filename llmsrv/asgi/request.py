"""A request as its handler sees it.  Knows nothing about sockets, routes or JSON."""

import asyncio
import functools
from collections.abc import AsyncIterator
from collections.abc import Callable
from contextlib import asynccontextmanager
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
        self._body: bytes | None = None

    async def body(self, limit_bytes: int) -> bytes:
        """The whole body; it is read only once.

        Raises ApiError 413 as soon as the body is known to exceed limit_bytes, and
        ClientDisconnected if the client goes away first.
        """
        if self._body is None:
            self._body = await self._read_body(limit_bytes)
        return self._body

    async def _read_body(self, limit_bytes: int) -> bytes:
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

    @asynccontextmanager
    async def cancel_on_disconnect(self) -> AsyncIterator[None]:
        """Cancels the block when the client goes away; ClientDisconnected is then raised from it.

        Enter it after body(): it discards the rest of the body.
        """
        task = asyncio.current_task()
        assert task is not None
        is_gone = has_left = False

        def leave() -> None:
            nonlocal is_gone
            if not has_left:
                is_gone = True
                task.cancel()

        stop = self._watch(leave)
        try:
            yield
        except asyncio.CancelledError:
            # If the task was also cancelled from elsewhere, that must propagate (as in
            # asyncio.timeout).
            if not is_gone or task.uncancel() > 0:
                raise
            raise ClientDisconnected from None
        finally:
            has_left = True
            stop()

    def _watch(self, on_disconnect: Callable[[], None]) -> Callable[[], object]:
        """Calls on_disconnect when the client goes away, until the returned function is called."""
        if register := self.scope.get(ON_DISCONNECT):
            # Soon, not now: a task that is running cannot be cancelled before its next await.
            soon = asyncio.get_running_loop().call_soon
            register(functools.partial(soon, on_disconnect))
            return functools.partial(register, None)

        async def watch() -> None:
            while (await self._receive())["type"] != "http.disconnect":
                pass
            # Not in a done callback: that could run after the block has been left.
            on_disconnect()

        return asyncio.create_task(watch()).cancel


def _body_too_large(limit_bytes: int) -> ApiError:
    return ApiError(413, f"The request body is larger than the {limit_bytes} bytes allowed.")
