"""How an answer goes out, whatever its dialect: as one body, or as a stream of events."""

from collections.abc import AsyncIterator
from typing import Protocol

from llmsrv.api.generation.job import Job
from llmsrv.asgi.request import Request
from llmsrv.asgi.response import Response
from llmsrv.asgi.sse import Event
from llmsrv.asgi.sse import EventStream


class Answer(Protocol):
    """One request's answer in the shape of its route."""

    async def whole(self) -> bytes:
        """The body, when every choice has ended."""
        ...

    def events(self) -> AsyncIterator[bytes] | AsyncIterator[bytes | Event]:
        """The events of a stream, as in asgi/sse.py."""
        ...


async def respond(
    request: Request, job: Job, answer: Answer, is_stream: bool
) -> Response | EventStream:
    """The answer to a started job.  A client that leaves ends the job."""
    if is_stream:
        return EventStream(answer.events(), ready=job.admitted, on_end=job.end)
    with request.cancel_on_disconnect():
        return Response(body=await answer.whole())
