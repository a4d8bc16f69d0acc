"""Every route refuses with OpenAI's error object: the application alone, without sockets."""

import asyncio
import json
from pathlib import Path
from typing import Any
from typing import cast

import pytest

from llmsrv.api.gate import Gate
from llmsrv.asgi.types import Message
from llmsrv.asgi.types import Receive
from llmsrv.asgi.types import Scope
from llmsrv.asgi.types import Send
from llmsrv.config import Config
from llmsrv.errors import ApiError
from llmsrv.http_app import build_http_app
from llmsrv.registry.models import Model
from llmsrv.registry.models import Models
from llmsrv.registry.service import Service
from tests.support.application import Answer
from tests.support.application import ask
from tests.support.parameters import slow_but

KEY = "sk-test"
ROUTES = {
    "/v1/chat/completions": "POST",
    "/v1/completions": "POST",
    "/v1/models": "GET",
    "/v1/models/tiny": "GET",
    "/models/load": "POST",
    "/models/unload": "POST",
    "/health": "GET",
    "/ready": "GET",
    "/live": "GET",
    "/version": "GET",
    "/metrics": "GET",
}
POSTS = [path for path, method in ROUTES.items() if method == "POST"]
GENERATES = ["/v1/chat/completions", "/v1/completions"]
REQUEST = {"model": "tiny", "prompt": "a", "messages": [{"role": "user", "content": "a"}]}


class Loaded:
    """A model in a state in which it refuses requests."""

    def __init__(self, error: Exception | None) -> None:
        self._error = error

    def unavailable(self) -> ApiError | None:
        if not isinstance(self._error, ApiError | None):
            raise self._error
        return self._error

    def overloaded(self, tenant: bytes) -> ApiError | None:
        return ApiError(429, "Rate limit reached.", code="rate_limit_exceeded")


def refusal(
    path: str,
    method: str = "",
    body: Any = REQUEST,
    state: Loaded | None = None,
    **headers: str,
) -> Answer:
    """The answer to a request, sent as JSON with the right key unless `headers` say otherwise."""
    model = Model(["tiny"], Path("tiny.gguf"))
    model.service = cast(Service, state)
    app = build_http_app(Models(Config(), [model]), Gate("127.0.0.1", [], [KEY]), lambda: {})
    fields = {"host": "localhost", "authorization": f"Bearer {KEY}"}
    fields |= {"content_type": "application/json"} | headers
    fields = {name.replace("_", "-"): value for name, value in fields.items()}
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = asyncio.run(ask(app, method or ROUTES[path], path, fields, data))
    assert answer.headers["content-type"] == "application/json" and answer.is_whole
    assert answer.headers["x-request-id"]
    return answer


def error_of(answer: Answer) -> tuple[int, str, str | None]:
    document = json.loads(answer.body)
    assert list(document) == ["error"]
    error = document["error"]
    assert list(error) == ["message", "type", "param", "code"] and error["message"]
    return answer.status, error["type"], error["code"]


@pytest.mark.parametrize("path", ROUTES)
def test_every_route_refuses_wrong_methods_hosts_and_keys(path: str) -> None:
    invalid = "invalid_request_error"
    not_allowed = refusal(path, "DELETE")
    assert error_of(not_allowed) == (405, invalid, "method_not_supported")
    assert ROUTES[path] in not_allowed.headers["allow"]
    assert error_of(refusal(f"/v2{path}", "GET")) == (404, invalid, "unknown_url")
    assert error_of(refusal(path, "BREW")) == (501, "server_error", "not_implemented")
    assert error_of(refusal(path, host="evil.example")) == (403, invalid, "host_not_allowed")
    if path not in ("/health", "/ready", "/live"):
        wrong_key = refusal(path, authorization="Bearer no")
        assert error_of(wrong_key) == (401, invalid, "invalid_api_key")
        without_key = refusal(path, authorization="")
        assert error_of(without_key) == (401, invalid, None)  # as OpenAI's
        assert without_key.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", POSTS)
def test_every_route_with_a_body_refuses_an_invalid_one(path: str) -> None:
    invalid = "invalid_request_error"
    for no_json in (b"", b"{", b"[" * 100_000):
        assert error_of(refusal(path, body=no_json)) == (400, invalid, "invalid_json")
    for no_object in ([], None, "text", {"model": 1}):
        assert error_of(refusal(path, body=no_object)) == (400, invalid, "invalid_type")
    assert error_of(refusal(path, body={})) == (400, invalid, "missing_required_parameter")
    assert error_of(refusal(path, body=b" " * (9 << 20))) == (413, invalid, "request_too_large")
    media = (415, invalid, "unsupported_media_type")
    assert error_of(refusal(path, content_type="text/plain")) == media
    assert error_of(refusal(path, content_encoding="gzip")) == media
    unknown = refusal(path, body=REQUEST | {"model": "none"})
    assert error_of(unknown) == (404, invalid, "model_not_found")
    assert b'"param": "model"' in unknown.body


@pytest.mark.parametrize("part", slow_but([b'""', b"{}", b"[]", b'"\\\\"'], b'""'))
def test_a_body_of_a_million_parts_is_refused_before_it_blocks_the_loop(part: bytes) -> None:
    body = b'{"a": [' + b",".join([part] * 1_000_000) + b"]}"
    answer = refusal("/v1/completions", body=body)
    assert error_of(answer) == (413, "invalid_request_error", "request_too_large")


def test_a_string_of_a_million_quotation_marks_is_one_part() -> None:
    answer = refusal("/v1/completions", body=REQUEST | {"prompt": '"' * 1_000_000})
    assert error_of(answer)[2] == "model_not_loaded"


@pytest.mark.parametrize("path", GENERATES)
@pytest.mark.parametrize(
    "error, wanted",
    [
        (None, (429, "rate_limit_error", "rate_limit_exceeded")),
        (
            ApiError(503, "Not ready.", code="model_not_ready"),
            (503, "service_unavailable_error", "model_not_ready"),
        ),
        (ZeroDivisionError("secret"), (500, "server_error", "server_error")),
    ],
    ids=repr,
)
def test_a_server_error_does_not_reveal_its_cause(
    path: str, error: Exception | None, wanted: tuple[int, str, str]
) -> None:
    answer = refusal(path, state=Loaded(error))
    assert error_of(answer) == wanted
    assert b"secret" not in answer.body


@pytest.mark.parametrize("path", ["/models/load", "/models/unload"])
def test_a_forwarded_header_does_not_make_a_client_the_operator(path: str) -> None:
    app = build_http_app(Models(Config(), []), Gate("0.0.0.0", [], []), lambda: {})
    headers = {"x-forwarded-for": "127.0.0.1", "forwarded": "for=127.0.0.1", "host": "localhost"}
    answer = asyncio.run(ask(app, "POST", path, headers))
    assert error_of(answer) == (403, "invalid_request_error", "api_key_required")


def test_a_server_without_a_loaded_model_says_so() -> None:
    for path in (*GENERATES, "/health", "/ready"):
        answer = refusal(path)
        assert error_of(answer) == (503, "service_unavailable_error", "model_not_loaded")
        assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("path", GENERATES)
@pytest.mark.parametrize("field", [("expect", "100-continue"), ("content-length", "70000")])
def test_52_a_body_that_would_be_refused_is_not_asked_for(
    path: str, field: tuple[str, str]
) -> None:
    """The first read of a body makes the server send `100 Continue`."""
    gate = Gate("127.0.0.1", [], [KEY])
    app = build_http_app(Models(Config(), [Model(["tiny"], Path("tiny.gguf"))]), gate, lambda: {})

    async def never_read(scope: Scope, _: Receive, send: Send) -> None:
        async def receive() -> Message:
            raise AssertionError("the body was asked for")

        await app(scope, receive, send)

    headers = {"host": "localhost", "authorization": f"Bearer {KEY}"}
    answer = asyncio.run(ask(never_read, "POST", path, dict([*headers.items(), field])))
    assert error_of(answer) == (503, "service_unavailable_error", "model_not_loaded")
