"""The HTTP application: request ids, CORS, the gate, the routes, and the one place where errors
become responses."""

import logging
import re
import secrets
import time
from collections.abc import Awaitable
from collections.abc import Callable
from collections.abc import Mapping
from functools import partial

from llmsrv.api.gate import Gate
from llmsrv.api.openai.chat import ChatCompletions
from llmsrv.api.openai.completions import Completions
from llmsrv.api.operations.health import HealthRoutes
from llmsrv.api.operations.models import ModelRoutes
from llmsrv.api.operations.traffic import Traffic
from llmsrv.api.operations.traffic import counted
from llmsrv.asgi.cors import CORS
from llmsrv.asgi.request import Headers
from llmsrv.asgi.request import Request
from llmsrv.asgi.response import Answer
from llmsrv.asgi.response import error_response
from llmsrv.asgi.router import Route
from llmsrv.asgi.router import Router
from llmsrv.asgi.sse import EventStream
from llmsrv.asgi.types import ASGIApp
from llmsrv.asgi.types import ClientDisconnected
from llmsrv.asgi.types import Message
from llmsrv.asgi.types import RawHeaders
from llmsrv.asgi.types import Receive
from llmsrv.asgi.types import Scope
from llmsrv.asgi.types import Send
from llmsrv.errors import ApiError
from llmsrv.registry.models import Models
from llmsrv.timing import Timer

log = logging.getLogger(__name__)

# A client's own request id is kept if it cannot harm a log or a header.
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
EXPOSED_HEADERS = ("x-request-id", "retry-after", "openai-processing-ms")


class HttpApp:
    """The application for `http` scopes."""

    def __init__(self, app: ASGIApp, cors: CORS) -> None:
        self._app = app
        self._cors = cors

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        return self._app(scope, receive, send)

    def error_headers(self, origin: bytes | None) -> RawHeaders:
        """CORS headers of an error that the HTTP server answers itself; origin: of the request."""
        # The server may not have read Origin yet; then only pages of any origin may read the error.
        return self._cors.response_fields((origin or b"null").decode("latin-1"))


def build_http_app(
    models: Models, gate: Gate, connections: Callable[[], Mapping[str, int]]
) -> HttpApp:
    """connections: as in Traffic"""
    config = models.config
    router = Router()
    router.add("POST", "/v1/chat/completions", ChatCompletions(models))
    router.add("POST", "/v1/completions", Completions(models))
    traffic = Traffic(connections)
    ModelRoutes(models).add_to(router)
    HealthRoutes(models, traffic).add_to(router)
    for path in ("/", "/docs", "/openapi.json"):  # where browsers look
        router.open(path)
    origins = config.allow_origins or (["*"] if gate.has_keys else "loopback")
    cors = CORS(
        Application(gate, router),
        allow_origins=origins,
        allow_methods=config.allow_methods,
        allow_headers=config.allow_headers,
        allow_credentials=config.allow_credentials,
        expose_headers=EXPOSED_HEADERS,
    )
    return HttpApp(counted(identified(cors), traffic), cors)


class Application:
    """Answers each request by its route; errors are encoded in the route's dialect."""

    def __init__(self, gate: Gate, router: Router) -> None:
        self._gate = gate
        self._router = router
        self._timer = Timer()  # of waits for admission, and of pings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        route = self._router.find(request)
        answer = await self._answer(request, route)
        if isinstance(answer, EventStream):
            with request.cancel_on_disconnect():
                await answer(send, route.dialect.error_event, self._timer)
        else:
            await answer(send)

    async def _answer(self, request: Request, route: Route) -> Answer:
        try:
            self._gate.check(request, route.access)
            if route.path is not None:
                request.scope["route"] = route.path  # for Traffic
            answer = await route.handler(request)
            if isinstance(answer, EventStream):
                with request.cancel_on_disconnect():
                    await answer.ready(self._timer)
            return answer
        except ApiError as error:
            return error_response(error, route.dialect)
        except ClientDisconnected:
            raise
        except MemoryError:
            log.error("%s %s failed: out of memory", request.method, request.path)
            message = "The server has not enough memory for this request now."
            retry = {"Retry-After": "1"}
            overload = ApiError(503, message, code="server_is_overloaded", headers=retry)
            return error_response(overload, route.dialect)
        except Exception:
            log.exception("%s %s failed", request.method, request.path)
            message = "The server had an error while processing your request."
            return error_response(ApiError(500, message), route.dialect)


def identified(app: ASGIApp) -> ASGIApp:
    """The application, with x-request-id and openai-processing-ms in the head of each response."""

    def identified_app(scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        given = Headers(scope["headers"]).get("x-request-id") or ""
        request_id = given if REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(16)}"
        return app(scope, receive, partial(send_identified, send, request_id, time.perf_counter()))

    def send_identified(
        send: Send, request_id: str, started_s: float, message: Message
    ) -> Awaitable[None]:
        if message["type"] == "http.response.start":
            milliseconds = int((time.perf_counter() - started_s) * 1000)
            message["headers"] = [
                *message["headers"],
                (b"x-request-id", request_id.encode()),
                (b"openai-processing-ms", b"%d" % milliseconds),
            ]
        return send(message)

    return identified_app
