"""Counts every HTTP request: status, duration and sizes, whatever its route does.

Names and buckets are those of prometheus-fastapi-instrumentator, so that existing dashboards work.
"""

import time
from collections import Counter
from collections import defaultdict
from collections.abc import Awaitable
from collections.abc import Callable
from collections.abc import Mapping

from llmsrv.asgi.request import Headers
from llmsrv.asgi.router import METHODS
from llmsrv.asgi.types import ASGIApp
from llmsrv.asgi.types import Message
from llmsrv.asgi.types import Receive
from llmsrv.asgi.types import Scope
from llmsrv.asgi.types import Send
from llmsrv.registry.counters import Histogram

ROUTE_S = (0.1, 0.5, 1)
ALL_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 7.5),
    *(10, 30, 60),
)


class Traffic:
    """The counters, by route as it was added to the router; "none" for requests without a route.

    connections  returns the HTTP server's totals by name, and the current open_connections
    """

    def __init__(self, connections: Callable[[], Mapping[str, int]]) -> None:
        self.connections = connections
        self.requests: Counter[tuple[str, str, str]] = Counter()  # by route, method and "2xx"
        self.duration_s = defaultdict[tuple[str, str], Histogram](lambda: Histogram(ROUTE_S))
        self.all_duration_s = Histogram(ALL_S)
        self.request_bytes: Counter[str] = Counter()
        self.response_bytes: Counter[str] = Counter()

    def note(
        self, scope: Scope, status: int, duration_s: float, response_bytes: int
    ) -> None:
        route = scope.get("route", "none")
        method = scope["method"] if scope["method"] in METHODS else "other"
        self.requests[route, method, f"{status // 100}xx"] += 1
        self.duration_s[route, method].observe(duration_s)
        self.all_duration_s.observe(duration_s)
        self.request_bytes[route] += int(Headers(scope["headers"]).get("content-length") or 0)
        self.response_bytes[route] += response_bytes

    def num_requests(self, route: str) -> int:
        return sum(number for key, number in self.requests.items() if key[0] == route)


class _CountedSend:
    """send(), with the status and the size of the body that it has sent."""

    __slots__ = ("status", "num_bytes", "_send")

    def __init__(self, send: Send) -> None:
        self.status = 0
        self.num_bytes = 0
        self._send = send

    def __call__(self, message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self.num_bytes += len(message["body"])
        return self._send(message)


def counted(app: ASGIApp, traffic: Traffic) -> ASGIApp:
    """The application, with each response counted when it ends; a request that gets no response is
    not counted."""

    async def counted_app(scope: Scope, receive: Receive, send: Send) -> None:
        begun_s = time.perf_counter()
        counted_send = _CountedSend(send)
        try:
            await app(scope, receive, counted_send)
        finally:
            status, num_bytes = counted_send.status, counted_send.num_bytes
            if status:
                traffic.note(scope, status, time.perf_counter() - begun_s, num_bytes)

    return counted_app
