"""Routes: a table of requests and where they lead."""

import asyncio
from typing import Any
from typing import cast

import pytest

from llmsrv.asgi.request import Request
from llmsrv.asgi.response import Answer
from llmsrv.asgi.response import Response
from llmsrv.asgi.router import Access
from llmsrv.asgi.router import Router
from llmsrv.asgi.types import Message
from llmsrv.errors import ApiError


async def receive() -> Message:
    raise AssertionError


def handler(name: str) -> Any:
    async def handle(request: Request) -> Answer:
        return Response(200, f"{name} {request.path_params}".encode())

    return handle


def make_router() -> Router:
    router = Router()
    router.add("GET", "/", handler("root"))
    router.add("GET", "/v1/models", handler("list"))
    router.add("GET", "/v1/models/{id}", handler("get"))
    router.add("DELETE", "/v1/models/{id}", handler("delete"))
    router.add("POST", "/v1/completions", handler("complete"))
    return router


def ask(method: str, raw_path: bytes) -> Response:
    scope = {"method": method, "path": "/", "raw_path": raw_path, "headers": []}
    return cast(Response, asyncio.run(ask_router(Request(scope, receive))))


async def ask_router(request: Request) -> Answer:
    return await make_router().find(request).handler(request)


@pytest.mark.parametrize(
    ("method", "raw_path", "body"),
    [
        ("GET", b"/", "root {}"),
        ("HEAD", b"/", "root {}"),
        ("GET", b"/v1/models", "list {}"),
        ("GET", b"/v1/models/a", "get {'id': 'a'}"),
        ("DELETE", b"/v1/models/a", "delete {'id': 'a'}"),
        ("GET", b"/v1/models/org%2Fname", "get {'id': 'org/name'}"),
        ("GET", b"/v1/models/org/name", "get {'id': 'org/name'}"),
        ("GET", b"/v1/models/%252F", "get {'id': '%2F'}"),
        ("GET", b"/v1/models/%C3%A9+", "get {'id': 'é+'}"),
        ("POST", b"/v1/completions", "complete {}"),
    ],
)
def test_a_route_is_found(method: str, raw_path: bytes, body: str) -> None:
    assert ask(method, raw_path).body.decode() == body


@pytest.mark.parametrize(
    ("method", "raw_path", "status", "allow"),
    [
        ("GET", b"/nowhere", 404, None),
        ("GET", b"/v1/models/", 404, None),
        ("GET", b"/v1/models/%c0%af", 404, None),
        ("GET", b"/V1/models", 404, None),
        ("GET", b"//v1/models", 404, None),
        ("GET", b"/v1/%6dodels", 404, None),
        ("OPTIONS", b"/nowhere", 404, None),
        ("POST", b"/v1/models", 405, "GET, HEAD, OPTIONS"),
        ("HEAD", b"/v1/completions", 405, "OPTIONS, POST"),
        ("PUT", b"/v1/models/a", 405, "DELETE, GET, HEAD, OPTIONS"),
        ("TRACE", b"/nowhere", 405, "DELETE, GET, HEAD, OPTIONS, POST"),
        ("CONNECT", b"h:1", 405, "DELETE, GET, HEAD, OPTIONS, POST"),
        ("get", b"/", 501, None),
        ("BREW", b"/nowhere", 501, None),
    ],
)
def test_a_request_without_a_route_is_an_error(
    method: str, raw_path: bytes, status: int, allow: str | None
) -> None:
    with pytest.raises(ApiError) as raised:
        ask(method, raw_path)
    assert (raised.value.status, raised.value.headers.get("Allow")) == (status, allow)


def test_the_error_of_an_unknown_url_is_openai_s() -> None:
    with pytest.raises(ApiError, match="^Unknown request URL: GET /x. Please check the URL") as e:
        ask("GET", b"/x")
    assert e.value.code == "unknown_url" and e.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("raw_path", "allow"),
    [(b"*", b"DELETE, GET, HEAD, OPTIONS, POST"), (b"/v1/models", b"GET, HEAD, OPTIONS")],
)
def test_options_is_answered(raw_path: bytes, allow: bytes) -> None:
    response = ask("OPTIONS", raw_path)
    assert (response.status, response.headers) == (204, [(b"allow", allow)])


@pytest.mark.parametrize(
    ("method", "raw_path", "path", "access"),
    [
        ("GET", b"/health", "/health", Access.OPEN),
        ("HEAD", b"/health", "/health", Access.OPEN),
        ("POST", b"/health", "/health", Access.OPEN),
        ("OPTIONS", b"/health", "/health", Access.OPEN),
        ("GET", b"/health/", None, Access.KEY),
        ("GET", b"/he%61lth", None, Access.KEY),
        ("GET", b"/a/b%2Fc", "/a/{id}", Access.KEY),
        ("GET", b"/admin", "/admin", Access.OPEN),
        ("POST", b"/admin", "/admin", Access.OPERATOR),
        ("PUT", b"/admin", "/admin", Access.OPERATOR),
        ("BREW", b"/admin", None, Access.OPERATOR),
        ("OPTIONS", b"*", None, Access.KEY),
        ("GET", b"/docs", None, Access.OPEN),
        ("GET", b"/docs/", None, Access.KEY),
    ],
)
def test_every_request_has_a_path_and_an_access_and_unrouted_ones_the_strictest(
    method: str, raw_path: bytes, path: str | None, access: Access
) -> None:
    router = Router()
    router.add("GET", "/health", handler("health"), Access.OPEN)
    router.add("GET", "/a/{id}", handler("a"))
    router.open("/docs")
    router.add("GET", "/admin", handler("admin"), Access.OPEN)
    router.add("POST", "/admin", handler("admin"), Access.OPERATOR)
    scope = {"method": method, "path": "/", "raw_path": raw_path, "headers": []}
    route = router.find(Request(scope, receive))
    assert (route.path, route.access) == (path, access)
