"""Routes whose clients expect other errors and events than OpenAI's clients do."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from llmsrv.api.gate import Gate
from llmsrv.asgi.dialect import Dialect
from llmsrv.asgi.request import Request
from llmsrv.asgi.response import Answer
from llmsrv.asgi.router import Access
from llmsrv.asgi.router import Router
from llmsrv.asgi.sse import Event
from llmsrv.asgi.sse import EventStream
from llmsrv.asgi.types import Message
from llmsrv.errors import ApiError
from llmsrv.http_app import Application
from tests.support.application import Answer as Received
from tests.support.application import ask

KEY = "sk-test"


def error_body(error: ApiError) -> bytes:
    return b"toy %d %b" % (error.status, error.message.encode())


def error_event(error: ApiError) -> Event:
    return Event(json.dumps({"message": error.message}).encode(), "error")


TOY = Dialect(error_body, error_event, "text/x-toy")


async def refuse(request: Request) -> Answer:
    raise ApiError(429, "slow down", headers={"Retry-After": "3"})


async def crash(request: Request) -> Answer:
    raise ZeroDivisionError("secret")


async def stream(request: Request) -> Answer:
    async def events() -> AsyncIterator[bytes | Event]:
        yield Event(b'{"a":1}', "start")
        yield b'{"b":2}'
        if request.headers.get("fail"):
            raise ApiError(500, "gone")

    return EventStream(events())


def answer(method: str, path: str, **headers: str) -> Received:
    router = Router()
    for name, handler in {"refuse": refuse, "crash": crash, "stream": stream}.items():
        router.add("POST", f"/toy/{name}", handler, Access.OPEN, TOY)
        router.add("POST", f"/openai/{name}", handler, Access.OPEN)
    router.add("POST", "/toy/locked", refuse, dialect=TOY)
    app = Application(Gate("127.0.0.1", [], [KEY]), router)
    return asyncio.run(ask(app, method, path, headers))


def test_an_error_of_a_handler_has_the_shape_of_its_route() -> None:
    toy = answer("POST", "/toy/refuse")
    assert (toy.status, toy.body) == (429, b"toy 429 slow down")
    assert toy.headers["content-type"] == "text/x-toy"
    assert toy.headers["content-length"] == "17"
    assert toy.headers["retry-after"] == "3"
    openai = answer("POST", "/openai/refuse")
    assert json.loads(openai.body)["error"]["message"] == "slow down"
    assert openai.headers["content-type"] == "application/json"


def test_a_crash_of_a_handler_has_the_shape_of_its_route_and_no_details() -> None:
    toy = answer("POST", "/toy/crash")
    assert toy.status == 500
    assert toy.body.startswith(b"toy 500 The server had an error")
    assert b"secret" not in toy.body


@pytest.mark.parametrize(
    "method, path, body",
    [
        ("POST", "/toy/locked", b"toy 401 You didn't provide an API key."),
        ("GET", "/toy/refuse", b"toy 405 Not allowed: GET /toy/refuse."),
        ("GET", "/toy/none", b'{"error": '),
    ],
)
def test_the_gate_and_a_wrong_method_use_the_dialect_of_the_path(
    method: str, path: str, body: bytes
) -> None:
    assert answer(method, path).body.startswith(body)


def test_events_are_named_only_if_they_have_a_name() -> None:
    toy = answer("POST", "/toy/stream")
    assert toy.body == b'event: start\ndata: {"a":1}\n\ndata: {"b":2}\n\n'
    assert toy.is_whole


def test_the_error_event_of_a_stream_has_the_shape_of_its_route() -> None:
    toy = answer("POST", "/toy/stream", fail="yes")
    assert toy.body.endswith(b'\n\nevent: error\ndata: {"message": "gone"}\n\n')
    assert not toy.is_whole
    openai = answer("POST", "/openai/stream", fail="yes")
    assert openai.body.endswith(b"\n\ndata: " + ApiError(500, "gone").body() + b"\n\n")


def test_a_crash_in_a_stream_is_reported_in_the_dialect_without_details() -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def events() -> AsyncIterator[bytes]:
        yield b"{}"
        raise KeyError("secret")

    with pytest.raises(KeyError):
        asyncio.run(EventStream(events())(send, TOY.error_event))
    body = b"".join(message.get("body", b"") for message in sent)
    assert body == b'data: {}\n\nevent: error\ndata: {"message": "The server failed."}\n\n'
