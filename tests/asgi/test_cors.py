"""CORS: a table of which pages may read what."""

import asyncio
from typing import Any

import pytest

from llmsrv.asgi.cors import CORS
from llmsrv.asgi.response import Response
from llmsrv.asgi.types import Message
from llmsrv.asgi.types import Receive
from llmsrv.asgi.types import Scope
from llmsrv.asgi.types import Send

Fields = dict[str, str]


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    await Response(404, b"{}")(send)


def ask(cors: CORS, method: str, **headers: str) -> tuple[int, Fields]:
    """The status and CORS fields of the response; header names with _ for -."""
    messages: list[Message] = []

    async def send(message: Message) -> None:
        messages.append(message)

    async def receive() -> Message:
        raise AssertionError

    raw = [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]
    asyncio.run(cors({"method": method, "headers": raw}, receive, send))
    fields = {k.decode(): v.decode() for k, v in messages[0]["headers"]}
    assert len(fields) == len(messages[0]["headers"]), "a field is there twice"
    names = [k for k in fields if k == "vary" or k.startswith("access-control-")]
    return messages[0]["status"], {k.removeprefix("access-control-"): fields[k] for k in names}


def preflight(cors: CORS, origin: str, method: str = "POST", headers: str = "") -> Any:
    extra = {"access_control_request_headers": headers} if headers else {}
    return ask(cors, "OPTIONS", origin=origin, access_control_request_method=method, **extra)


A = "https://a.example"


@pytest.mark.parametrize(
    ("origins", "credentials", "origin", "expected"),
    [
        (["*"], False, None, {}),
        (["*"], False, A, {"allow-origin": "*"}),
        (["*"], False, "null", {"allow-origin": "*"}),
        (["*"], True, None, {"vary": "Origin"}),
        (["*"], True, A, {"vary": "Origin", "allow-origin": A, "allow-credentials": "true"}),
        ([A], False, None, {"vary": "Origin"}),
        ([A], False, A, {"vary": "Origin", "allow-origin": A}),
        ([A], True, A, {"vary": "Origin", "allow-origin": A, "allow-credentials": "true"}),
        ([A], False, "https://a.example.evil", {"vary": "Origin"}),
        ([A], False, "http://a.example", {"vary": "Origin"}),
        ([], False, A, {"vary": "Origin"}),
    ],
)
def test_a_response_says_who_may_read_it(
    origins: list[str], credentials: bool, origin: str | None, expected: Fields
) -> None:
    cors = CORS(app, origins, allow_credentials=credentials)
    headers = {} if origin is None else {"origin": origin}
    assert ask(cors, "POST", **headers) == (404, expected)


@pytest.mark.parametrize(
    ("origin", "is_allowed"),
    [
        ("http://localhost", True),
        ("http://localhost:3000", True),
        ("https://127.0.0.1:8443", True),
        ("http://[::1]:5173", True),
        ("http://localhost.evil.example", False),
        ("http://localhost:3000.evil.example", False),
        ("http://evil.example#http://localhost", False),
        ("ftp://localhost", False),
        ("http://127.0.0.1:", False),
        ("http://localhost:3000\n", False),
        ("null", False),
        ("", False),
    ],
)
def test_loopback_is_exactly_three_hosts_with_any_port(origin: str, is_allowed: bool) -> None:
    assert CORS(app, "loopback").is_allowed(origin) is is_allowed


def test_pages_may_read_the_exposed_headers() -> None:
    cors = CORS(app, ["*"], expose_headers=["x-request-id", "retry-after"])
    assert ask(cors, "GET", origin=A)[1]["expose-headers"] == "x-request-id, retry-after"


@pytest.mark.parametrize("requested", ["authorization,content-type", "x-api-key, content-type"])
def test_a_preflight_is_answered_without_the_application(requested: str) -> None:
    status, fields = preflight(CORS(app, ["*"]), A, headers=requested)
    assert status == 204
    assert fields == {
        "vary": "Origin, Access-Control-Request-Method, Access-Control-Request-Headers",
        "allow-origin": "*",
        "allow-methods": "DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT",
        "allow-headers": requested,
        "max-age": "600",
    }


def test_a_preflight_with_lists_names_them() -> None:
    cors = CORS(app, [A], ["GET"], ["Authorization"], allow_credentials=True)
    status, fields = preflight(cors, A, "GET", "authorization, ACCEPT")
    assert status == 204
    assert (fields["allow-origin"], fields["allow-credentials"]) == (A, "true")
    assert fields["allow-methods"] == "GET"
    expected = "Accept, Accept-Language, Authorization, Content-Language, Content-Type"
    assert fields["allow-headers"] == expected


@pytest.mark.parametrize(
    ("origin", "method", "headers"),
    [("https://b.example", "GET", ""), (A, "PUT", ""), (A, "GET", "x-secret")],
)
def test_a_refused_preflight_allows_nothing(
    origin: str, method: str, headers: str
) -> None:
    cors = CORS(app, [A], ["GET"], ["Authorization"])
    status, fields = preflight(cors, origin, method, headers)
    assert status == 400 and set(fields) == {"vary"}


def test_options_without_a_requested_method_goes_to_the_application() -> None:
    assert ask(CORS(app, ["*"]), "OPTIONS", origin=A)[0] == 404
    assert ask(CORS(app, ["*"]), "OPTIONS", access_control_request_method="GET")[0] == 404
