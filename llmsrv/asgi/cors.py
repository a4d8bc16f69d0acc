"""Cross-origin resource sharing (WHATWG Fetch section 3.2): which web pages may call this server.

It wraps an application.  It answers preflights and adds headers to every other response, including
errors, which a page cannot read without them.  It never refuses an actual request: the browser
withholds the response from pages of other origins.  Headers that do not depend on the request are
computed once.
"""

import re
from collections.abc import Awaitable
from collections.abc import Sequence
from functools import partial
from typing import Literal

from llmsrv.asgi.request import Headers
from llmsrv.asgi.response import Response
from llmsrv.asgi.response import error_response
from llmsrv.asgi.types import ASGIApp
from llmsrv.asgi.types import Message
from llmsrv.asgi.types import Receive
from llmsrv.asgi.types import Scope
from llmsrv.asgi.types import Send
from llmsrv.errors import ApiError

LOOPBACK_ORIGIN = re.compile(r"https?://(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?")
ALL_METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
# Fetch allows these without a preflight, but Content-Type only with the values of an HTML form.
SAFE_HEADERS = ("Accept", "Accept-Language", "Content-Language", "Content-Type")
PREFLIGHT_MAX_AGE_S = 600

Fields = list[tuple[bytes, bytes]]


class CORS:
    """An application wrapped in CORS.

    allow_origins      ["*"] for any, a list of origins, or "loopback": http and https on
                       localhost, 127.0.0.1 and [::1] with any port
    allow_methods      methods that preflights allow, ["*"] for all
    allow_headers      request headers that preflights allow, ["*"] for all
    allow_credentials  whether pages may send cookies and HTTP authentication
    expose_headers     response headers that pages may read
    """

    def __init__(
        self,
        app: ASGIApp,
        allow_origins: Sequence[str] | Literal["loopback"],
        allow_methods: Sequence[str] = ("*",),
        allow_headers: Sequence[str] = ("*",),
        allow_credentials: bool = False,
        expose_headers: Sequence[str] = (),
    ) -> None:
        self._app = app
        self._loopback = allow_origins == "loopback"
        self._any_origin = not self._loopback and "*" in allow_origins
        self._origins = frozenset(() if self._loopback else allow_origins)
        # Fetch ignores `*` when credentials are allowed, so the origin must then be named.
        self._star = self._any_origin and not allow_credentials
        self._methods = ALL_METHODS if "*" in allow_methods else tuple(allow_methods)
        self._any_header = "*" in allow_headers
        self._headers = frozenset(h.lower() for h in (*SAFE_HEADERS, *allow_headers))

        vary: Fields = [] if self._star else [(b"vary", b"Origin")]
        common: Fields = [(b"access-control-allow-origin", b"*")] if self._star else []
        if allow_credentials:
            common.append((b"access-control-allow-credentials", b"true"))
        exposed = ", ".join(expose_headers).encode()
        self._not_allowed: Fields = vary
        self._allowed: Fields = [*vary, *common]
        if exposed:
            self._allowed.append((b"access-control-expose-headers", exposed))
        self._preflight: Fields = [
            (b"vary", b"Origin, Access-Control-Request-Method, Access-Control-Request-Headers"),
            *common,
            (b"access-control-allow-methods", ", ".join(self._methods).encode()),
            (b"access-control-max-age", b"%d" % PREFLIGHT_MAX_AGE_S),
        ]
        if not self._any_header:
            listed = ", ".join(sorted({*SAFE_HEADERS, *allow_headers})).encode()
            self._preflight.append((b"access-control-allow-headers", listed))

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        headers = Headers(scope["headers"])
        origin = headers.get("origin")
        if scope["method"] == "OPTIONS" and origin is not None:
            method = headers.get("access-control-request-method")
            if method is not None:
                return self._answer_preflight(origin, method, headers)(send)
        extra = self.response_fields(origin)
        return self._app(scope, receive, partial(_send_with, extra, send) if extra else send)

    def is_allowed(self, origin: str) -> bool:
        """Whether pages of that origin may read our responses."""
        if self._loopback:
            return LOOPBACK_ORIGIN.fullmatch(origin) is not None
        return self._any_origin or origin in self._origins

    def response_fields(self, origin: str | None) -> Fields:
        """What a response to a page of that origin needs; None: to a request without Origin."""
        if origin is None or not self.is_allowed(origin):
            return self._not_allowed
        return [*self._allowed, *self._named_origin(origin)]

    def _named_origin(self, origin: str) -> Fields:
        return [] if self._star else [(b"access-control-allow-origin", origin.encode("latin-1"))]

    def _answer_preflight(self, origin: str, method: str, headers: Headers) -> Response:
        requested = headers.get("access-control-request-headers") or ""
        if refused := self._refused_part(origin, method, requested):
            response = error_response(ApiError(400, f"CORS does not allow {refused}."))
            response.headers.append(self._preflight[0])
            return response
        fields = [*self._preflight, *self._named_origin(origin)]
        if self._any_header and requested:
            # Not `*`: that would exclude Authorization (Fetch section 3.2.2).
            fields.append((b"access-control-allow-headers", requested.encode("latin-1")))
        return Response(204, headers=fields)

    def _refused_part(self, origin: str, method: str, requested: str) -> str:
        """The part of a preflight that is not allowed, in words; empty if all of it is."""
        if not self.is_allowed(origin):
            return f"the origin {origin[:200]}"
        if method not in self._methods:
            return f"the method {method[:32]}"
        names = [name.strip().lower() for name in requested.split(",") if name.strip()]
        unknown = [] if self._any_header else [n for n in names if n not in self._headers]
        return f"the header {unknown[0][:200]}" if unknown else ""


def _send_with(extra: Fields, send: Send, message: Message) -> Awaitable[None]:
    """Sends a message; the head of a response gets extra fields."""
    if message["type"] == "http.response.start":
        message["headers"] = [*message.get("headers", ()), *extra]
    return send(message)
