"""Finds the handler for a method and a path.

A path matches as the bytes that were sent or not at all: nothing is decoded, normalised or
redirected, so no two spellings of a path can mean the same to us and differ to a proxy before us.
"""

from collections.abc import Awaitable
from collections.abc import Callable
from urllib.parse import unquote_to_bytes

from llmsrv.asgi.request import Request
from llmsrv.asgi.response import Answer
from llmsrv.asgi.response import Response
from llmsrv.errors import ApiError

Handler = Callable[[Request], Awaitable[Answer]]

METHODS = frozenset("CONNECT DELETE GET HEAD OPTIONS PATCH POST PUT TRACE".split())
MAX_SHOWN_PATH = 200


class Router:
    """A table of handlers, and itself a handler: calling it dispatches a request, whose
    scope["route"] then is the path as it was added.

    It answers OPTIONS itself, and a HEAD as the GET of that path; the server drops the body.
    Raises ApiError 404 for an unknown path, 405 for a known one without that method, 501 for a
    method that HTTP does not know.
    """

    def __init__(self) -> None:
        self._exact: dict[bytes, dict[str, Handler]] = {}
        self._tails: list[tuple[bytes, str, dict[str, Handler]]] = []

    def add(self, method: str, path: str, handler: Handler) -> None:
        """Routes `method path` to handler.

        A path may end in one parameter, as `/v1/models/{id}`: it takes the rest of the path,
        slashes too, and request.path_params holds it percent-decoded once; it is never empty.
        """
        prefix, brace, name = path.partition("{")
        if brace:
            self._tail(prefix.encode(), name.removesuffix("}"))[method] = handler
        else:
            self._exact.setdefault(path.encode(), {})[method] = handler

    def _tail(self, prefix: bytes, name: str) -> dict[str, Handler]:
        for known_prefix, known_name, handlers in self._tails:
            if (known_prefix, known_name) == (prefix, name):
                return handlers
        self._tails.append((prefix, name, {}))
        return self._tails[-1][2]

    async def __call__(self, request: Request) -> Answer:
        method = request.method
        if method not in METHODS:
            raise ApiError(501, f"The method {method[:32]} is not implemented.")
        handlers = self._find(request)
        handler = handlers.get("GET" if method == "HEAD" else method)
        if handler:
            return await handler(request)
        if method == "OPTIONS" and (handlers or request.raw_path == b"*"):
            return Response(204, headers=[(b"allow", self._allow(handlers).encode())])
        where = f"{method} {request.raw_path[:MAX_SHOWN_PATH].decode('latin-1')}"
        if handlers or method in ("CONNECT", "TRACE"):
            message = f"Not allowed: {where}."
            raise ApiError(
                405, message, code="method_not_supported", headers={"Allow": self._allow(handlers)}
            )
        message = f"Unknown request URL: {where}. Please check the URL for typos."
        raise ApiError(404, message, code="unknown_url")

    def _find(self, request: Request) -> dict[str, Handler]:
        """The handlers of the request's path by method, none for an unknown path."""
        path = request.raw_path
        if path in self._exact:
            request.scope["route"] = path.decode()
            return self._exact[path]
        for prefix, name, handlers in self._tails:
            if path.startswith(prefix) and len(path) > len(prefix):
                try:
                    value = unquote_to_bytes(path.removeprefix(prefix)).decode()
                except UnicodeDecodeError:
                    return {}
                request.path_params[name] = value
                request.scope["route"] = f"{prefix.decode()}{{{name}}}"
                return handlers
        return {}

    def _allow(self, handlers: dict[str, Handler]) -> str:
        """The value of Allow; without handlers (`OPTIONS *`) what any path allows."""
        tables = [handlers] if handlers else [*self._exact.values(), *(t[2] for t in self._tails)]
        methods = {method for table in tables for method in table} | {"OPTIONS"}
        if "GET" in methods:
            methods.add("HEAD")
        return ", ".join(sorted(methods))
