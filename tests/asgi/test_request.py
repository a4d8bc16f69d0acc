"""Requests as their handlers see them."""

import asyncio
from collections.abc import Callable
from collections.abc import Sequence

import pytest

from llmsrv.asgi.request import Request
from llmsrv.asgi.types import ClientDisconnected
from llmsrv.asgi.types import Message
from llmsrv.asgi.types import ON_DISCONNECT
from llmsrv.asgi.types import Scope
from llmsrv.errors import ApiError

DISCONNECT = {"type": "http.disconnect"}


class Inbox:
    """A receive() that the test fills; it waits while empty."""

    def __init__(self, messages: Sequence[Message] = ()) -> None:
        self._messages: asyncio.Queue[Message] = asyncio.Queue()
        for message in messages:
            self.put(message)

    def put(self, message: Message) -> None:
        self._messages.put_nowait(message)

    async def __call__(self) -> Message:
        return await self._messages.get()


class CallingInbox(Inbox):
    """That of a server that calls a function when the client goes away."""

    callback: Callable[[], object] | None = None

    def register(self, callback: Callable[[], object] | None) -> None:
        self.callback = callback

    def put(self, message: Message) -> None:
        if self.callback:
            self.callback()

    async def __call__(self) -> Message:
        raise AssertionError("no task need wait for messages")


INBOXES = pytest.mark.parametrize("inbox_type", [Inbox, CallingInbox])


def body(data: bytes, more_body: bool = False) -> Message:
    return {"type": "http.request", "body": data, "more_body": more_body}


def make_request(inbox: Inbox, *headers: tuple[bytes, bytes]) -> Request:
    scope: Scope = {"method": "POST", "path": "/", "headers": list(headers)}
    if isinstance(inbox, CallingInbox):
        scope[ON_DISCONNECT] = inbox.register
    return Request(scope, inbox)


def test_headers_match_in_any_case_and_may_repeat() -> None:
    headers = make_request(Inbox(), (b"x-a", b"1"), (b"b", b"\xe9"), (b"x-a", b"2")).headers
    assert headers.get("X-A") == "1" and headers.getlist("x-a") == ["1", "2"]
    assert headers.get("B") == "é" and headers.get("c") is None and headers.getlist("c") == []


def test_a_body_in_parts_is_joined() -> None:
    async def main() -> None:
        request = make_request(Inbox([body(b"a", True), body(b"", True), body(b"b")]))
        assert await request.body(2) == b"ab"

    asyncio.run(main())


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_over_the_limit_is_413(declared: bool) -> None:
    async def main() -> None:
        headers = [(b"content-length", b"3")] if declared else []
        inbox = Inbox([] if declared else [body(b"ab", True), body(b"c", True)])
        await make_request(inbox, *headers).body(2)

    with pytest.raises(ApiError) as raised:
        asyncio.run(main())
    assert raised.value.status == 413


def test_a_body_that_breaks_off_is_a_disconnect() -> None:
    with pytest.raises(ClientDisconnected):
        asyncio.run(make_request_and_read_half())


async def make_request_and_read_half() -> None:
    await make_request(Inbox([body(b"a", True), DISCONNECT])).body(9)


@INBOXES
def test_a_disconnect_cancels_the_guarded_block(inbox_type: type[Inbox]) -> None:
    async def main() -> None:
        inbox = inbox_type()
        cleaned_up = False
        asyncio.get_running_loop().call_soon(inbox.put, DISCONNECT)
        with pytest.raises(ClientDisconnected):
            with make_request(inbox).cancel_on_disconnect():
                try:
                    await asyncio.Event().wait()
                finally:
                    cleaned_up = True
        assert cleaned_up
        await asyncio.sleep(0)  # the cancellation has been consumed, so this succeeds

    asyncio.run(main())


@INBOXES
def test_a_block_that_ends_before_a_disconnect_is_not_cancelled(inbox_type: type[Inbox]) -> None:
    async def main() -> None:
        inbox = inbox_type()
        with make_request(inbox).cancel_on_disconnect():
            await asyncio.sleep(0)
            inbox.put(DISCONNECT)
        for _ in range(3):
            await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


@INBOXES
def test_an_error_of_the_block_passes_through(inbox_type: type[Inbox]) -> None:
    async def main() -> None:
        with make_request(inbox_type()).cancel_on_disconnect():
            raise KeyError

    with pytest.raises(KeyError):
        asyncio.run(main())


@INBOXES
def test_a_cancellation_from_elsewhere_stays_a_cancellation(inbox_type: type[Inbox]) -> None:
    async def main() -> None:
        async def guarded() -> None:
            with make_request(inbox_type()).cancel_on_disconnect():
                await asyncio.Event().wait()

        task = asyncio.create_task(guarded())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
