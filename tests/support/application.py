"""Runs an ASGI application in memory, as a server would."""

import asyncio
import json
from collections.abc import AsyncIterator
from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from llmsrv.asgi.types import ASGIApp
from llmsrv.asgi.types import ClientDisconnected
from llmsrv.asgi.types import Message
from llmsrv.asgi.types import StreamBroken


@dataclass
class Answer:
    """status: 0 if none was sent; is_whole: whether the body or stream came to its end."""

    status: int
    headers: dict[str, str]
    body: bytes
    is_whole: bool

    @property
    def events(self) -> list[Any]:
        """The parsed payloads of a stream's events; [DONE] stays as it is."""
        events = [event.removeprefix("data: ") for event in self.body.decode().split("\n\n")]
        assert events.pop() == ""
        return [event if event == "[DONE]" else json.loads(event) for event in events]


async def ask(
    app: ASGIApp,
    method: str,
    path: str,
    headers: dict[str, str],
    body: bytes = b"",
    leaves_after: Callable[[bytes], bool] = lambda sent: False,
    **further: Any,
) -> Answer:
    """Sends one request.

    leaves_after  gets the body so far, and returns whether the client goes away now
    further       more fields of the scope
    """
    gone = asyncio.Event()
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    answer = Answer(0, {}, b"", False)

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = {n.decode(): value.decode() for n, value in message["headers"]}
            return
        answer.body += message["body"]
        answer.is_whole = not message["more_body"]
        if leaves_after(answer.body):
            gone.set()

    fields = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": fields, **further}
    try:
        await app(scope, receive, send)
    except (ClientDisconnected, StreamBroken):
        pass
    return answer


class StartupFailed(Exception):
    """The message of lifespan.startup.failed."""


@asynccontextmanager
async def lifespan(app: ASGIApp) -> AsyncIterator[None]:
    """Starts the application before the block and stops it afterwards."""
    inbox: asyncio.Queue[Message] = asyncio.Queue()
    outbox: asyncio.Queue[Message] = asyncio.Queue()
    task = asyncio.create_task(app({"type": "lifespan"}, inbox.get, outbox.put))
    await inbox.put({"type": "lifespan.startup"})
    answer = await outbox.get()
    if answer["type"] == "lifespan.startup.failed":
        await task
        raise StartupFailed(answer["message"])
    assert answer == {"type": "lifespan.startup.complete"}
    yield
    await inbox.put({"type": "lifespan.shutdown"})
    assert await outbox.get() == {"type": "lifespan.shutdown.complete"}
    await task
