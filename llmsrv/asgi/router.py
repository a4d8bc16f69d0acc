"""Finds the route for a method and a path.

A path matches only as the exact bytes that were sent: nothing is decoded, normalised or redirected.
Otherwise two spellings of a path could mean the same to us and differ to a proxy in front of us.
"""

import enum
from collections.abc import Awaitable
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from llmsrv.asgi.dialect import Dialect
from llmsrv.asgi.dialect import OPENAI
from llmsrv.asgi.request import Request
from llmsrv.asgi.response import Answer
from llmsrv.asgi.response import Response
from llmsrv.errors import ApiError

Handler = Callable[[Request], Awaitable[Answer]]

METHODS = frozenset("CONNECT DELETE GET HEAD OPTIONS PATCH POST PUT TRACE".split())
MAX_QUOTED_BYTES = 200  # of a path in an error message


class Access(enum.IntEnum):
    """Who may use a route, from anyone to few."""

    OPEN = 0  # anyone, even where API keys are set
    KEY = 1  # clients with an API key, if any keys are set
    OPERATOR = 2  # clients with an API key; without keys, clients on this machine


@dataclass(frozen=True)
class Route:
    """path     as it was added to the router; None for a request that has no route
    handler  answers the request, or raises an ApiError
    """

    path: str | None
    handler: Handler
    access: Access = Access.KEY
    dialect: Dialect = OPENAI


class Router:
    """A table of routes.  It answers OPTIONS itself, and HEAD as GET; the server drops the body."""

    def __init__(self) -> None:
        self._exact: dict[bytes, dict[str, Route]] = {}  # by path, then by method
        self._tails: dict[tuple[bytes, str], dict[str, Route]] = {}  # by prefix and parameter
        self._open_paths: set[bytes] = set()  # without routes

    def add(
        self,
        method: str,
        path: str,
        handler: Handler,
        access: Access = Access.KEY,
        dialect: Dialect = OPENAI,
    ) -> None:
        """Routes `method path` to handler.

        A path may end in one parameter, as in `/v1/models/{id}`.  The parameter takes the rest of
        the path, including slashes, and is never empty.  request.path_params holds it,
        percent-decoded once.
        """
        prefix, brace, name = path.partition("{")
        if brace:
            routes = self._tails.setdefault((prefix.encode(), name.removesuffix("}")), {})
        else:
            routes = self._exact.setdefault(path.encode(), {})
        routes[method] = Route(path, handler, access, dialect)

    def open(self, path: str) -> None:
        """Makes a path without routes 404 for everyone, not 401 for clients without a key."""
        self._open_paths.add(path.encode())

    def find(self, request: Request) -> Route:
        """The route of a request, for every request.

        Without a matching route, the handler raises ApiError: 404 for an unknown path, 405 for a
        known path without that method, 501 for a method that HTTP does not define.  Such a route
        has the strictest access of its path; for an unknown path that is KEY, unless it is open.
        """
        routes = self._routes(request)
        method = "GET" if request.method == "HEAD" else request.method
        if route := routes.get(method):
            return route
        if not routes:
            is_open = request.raw_path in self._open_paths
            return Route(None, self._answer_unrouted, Access.OPEN if is_open else Access.KEY)
        first = next(iter(routes.values()))
        path = first.path if request.method in METHODS else None
        access = max(route.access for route in routes.values())
        return Route(path, self._answer_unrouted, access, first.dialect)

    def _routes(self, request: Request) -> dict[str, Route]:
        """The routes of the request's path by method; empty for an unknown path."""
        path = request.raw_path
        if path in self._exact:
            return self._exact[path]
        for (prefix, name), routes in self._tails.items():
            if path.startswith(prefix) and len(path) > len(prefix):
                try:
                    value = unquote_to_bytes(path.removeprefix(prefix)).decode()
                except UnicodeDecodeError:
                    return {}
                request.path_params[name] = value
                return routes
        return {}

    async def _answer_unrouted(self, request: Request) -> Answer:
        method = request.method
        if method not in METHODS:
            raise ApiError(501, f"The method {method[:32]} is not implemented.")
        routes = self._routes(request)
        if method == "OPTIONS" and (routes or request.raw_path == b"*"):
            return Response(204, headers=[(b"allow", self._allow(routes).encode())])
        where = f"{method} {request.raw_path[:MAX_QUOTED_BYTES].decode('latin-1')}"
        if routes or method in ("CONNECT", "TRACE"):
            message = f"Not allowed: {where}."
            raise ApiError(
                405, message, code="method_not_supported", headers={"Allow": self._allow(routes)}
            )
        message = f"Unknown request URL: {where}. Please check the URL for typos."
        raise ApiError(404, message, code="unknown_url")

    def _allow(self, routes: dict[str, Route]) -> str:
        """The value of Allow; for an unknown path (`OPTIONS *`) the methods of all paths."""
        tables = [routes] if routes else [*self._exact.values(), *self._tails.values()]
        methods = {method for table in tables for method in table} | {"OPTIONS"}
        if "GET" in methods:
            methods.add("HEAD")
        return ", ".join(sorted(methods))
