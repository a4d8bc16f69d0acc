"""Event streams, read back with the parser of OpenAI's client."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from openai._streaming import SSEDecoder

from llmsrv.asgi.sse import Event
from llmsrv.asgi.sse import EventStream
from llmsrv.asgi.sse import PING
from llmsrv.asgi.sse import frame
from llmsrv.asgi.types import ClientDisconnected
from llmsrv.asgi.types import Message
from llmsrv.asgi.types import StreamBroken
from llmsrv.errors import ApiError


class Outbox:
    """A send() that keeps all messages."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    async def __call__(self, message: Message) -> None:
        self.messages.append(message)

    @property
    def data(self) -> bytes:
        return b"".join(message["body"] for message in self.messages[1:])

    @property
    def is_complete(self) -> bool:
        return not self.messages[-1].get("more_body", True)


async def iterate(*items: bytes | Exception) -> AsyncIterator[bytes]:
    for item in items:
        if isinstance(item, Exception):
            raise item
        yield item


def test_a_stream_sends_its_head_at_once_then_events_then_its_end() -> None:
    outbox = Outbox()
    asyncio.run(EventStream(iterate(b'{"a":1}', b"[DONE]"), headers=[(b"x", b"y")])(outbox))
    start, flush = outbox.messages[:2]
    assert start["status"] == 200
    assert dict(start["headers"]) == {
        b"content-type": b"text/event-stream; charset=utf-8",
        b"cache-control": b"no-cache",
        b"x-accel-buffering": b"no",
        b"x": b"y",
    }
    assert flush == {"type": "http.response.body", "body": b"", "more_body": True}
    assert outbox.data == b'data: {"a":1}\n\ndata: [DONE]\n\n'
    assert outbox.is_complete


def test_an_api_error_is_the_last_event_of_a_broken_stream() -> None:
    outbox = Outbox()
    error = ApiError(500, "gone", code="engine_restarted")
    with pytest.raises(StreamBroken):
        asyncio.run(EventStream(iterate(b"{}", error))(outbox))
    assert outbox.data == b"data: {}\n\ndata: " + error.body() + b"\n\n"
    assert not outbox.is_complete


def test_a_bug_is_reported_without_its_details_and_raised() -> None:
    outbox = Outbox()
    with pytest.raises(KeyError):
        asyncio.run(EventStream(iterate(KeyError("secret")))(outbox))
    assert b'"server_error"' in outbox.data and b"secret" not in outbox.data
    assert not outbox.is_complete


def test_nothing_is_sent_to_a_client_that_is_gone() -> None:
    outbox = Outbox()
    with pytest.raises(ClientDisconnected):
        asyncio.run(EventStream(iterate(ClientDisconnected()))(outbox))
    assert outbox.data == b""


def test_a_quiet_stream_is_kept_alive_by_comments_until_its_end() -> None:
    async def main() -> None:
        outbox = Outbox()
        pinged = asyncio.Event()

        async def send(message: Message) -> None:
            await outbox(message)
            if message.get("body") == PING:
                pinged.set()

        async def events() -> AsyncIterator[bytes]:
            yield b"1"
            await pinged.wait()
            yield b"2"

        await EventStream(events(), ping_s=0.01)(send)
        data = outbox.data
        assert data.startswith(b"data: 1\n\n: ping\n\n") and data.endswith(b"data: 2\n\n")
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


@pytest.mark.parametrize("where", ["in the iterator", "in send"])
def test_a_cancelled_stream_closes_its_events(where: str) -> None:
    async def main() -> None:
        closed = asyncio.Event()

        async def events() -> AsyncIterator[bytes]:
            try:
                yield b"1"
                await asyncio.Event().wait()
            finally:
                closed.set()

        async def send(message: Message) -> None:
            if where == "in send" and message.get("body"):
                await asyncio.Event().wait()

        task = asyncio.create_task(EventStream(events())(send))
        for _ in range(3):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert closed.is_set()

    asyncio.run(main())


def test_a_stream_that_breaks_before_its_first_event_still_calls_on_end() -> None:
    async def send_to_nobody(message: Message) -> None:
        raise ClientDisconnected

    ends: list[str] = []
    stream = EventStream(iterate(b"{}"), on_end=lambda: ends.append("ended"))
    with pytest.raises(ClientDisconnected):
        asyncio.run(stream(send_to_nobody))
    assert ends == ["ended"]


def test_the_openai_client_reads_every_event_and_nothing_else() -> None:
    outbox = Outbox()
    payloads = ['{"a":"\\n\u2028é"}'.encode(), b"[DONE]"]
    asyncio.run(EventStream(iterate(*payloads))(outbox))
    data = PING + outbox.data.replace(b"data: [", PING + b"data: [")
    events = list(SSEDecoder().iter_bytes(iter([data])))
    assert [event.data.encode() for event in events] == payloads
    assert {(event.event, event.id, event.retry) for event in events} == {(None, None, None)}


def test_a_named_event_is_read_back_with_its_name() -> None:
    data = frame(Event(b'{"a":1}', "message_start")) + frame(Event(b"{}")) + frame(b"[]")
    events = [(e.event, e.data) for e in SSEDecoder().iter_bytes(iter([data]))]
    assert events == [("message_start", '{"a":1}'), (None, "{}"), (None, "[]")]


@pytest.mark.parametrize(
    "event", [b"a\nb", b"a\rb", Event(b"a\nb", "x"), Event(b"a", "x\ny"), Event(b"a", "x\ry")]
)
def test_every_field_of_an_event_must_be_one_line(event: bytes | Event) -> None:
    with pytest.raises(AssertionError):
        frame(event)
