"""An ASGI application asked in memory, as the server would ask it."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmsrv.asgi.types import ASGIApp
from llmsrv.asgi.types import ClientDisconnected
from llmsrv.asgi.types import Message
from llmsrv.asgi.types import StreamBroken


@dataclass
class Answer:
    """status is 0 where none was sent; is_whole: the stream or body came to its end."""

    status: int
    headers: dict[str, str]
    body: bytes
    is_whole: bool

    @property
    def events(self) -> list[Any]:
        """The payloads of a stream's events, parsed, but for [DONE]."""
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
) -> Answer:
    """leaves_after: whether the client goes away now that so much of the body has come."""
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
    scope = {"type": "http", "method": method, "path": path, "headers": fields}
    try:
        await app(scope, receive, send)
    except (ClientDisconnected, StreamBroken):
        pass
    return answer
