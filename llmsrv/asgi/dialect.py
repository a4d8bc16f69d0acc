"""How the clients of a route expect its errors.

A dialect is part of a route: the application encodes with it every error of that route, whether it
ends a request or a stream that has already begun.
"""

from collections.abc import Callable
from dataclasses import dataclass

from llmsrv.asgi.sse import Event
from llmsrv.errors import ApiError


@dataclass(frozen=True)
class Dialect:
    """error_body   encodes the body of an error response
    error_event  encodes the last event of a stream that fails
    content_type of error responses
    """

    error_body: Callable[[ApiError], bytes]
    error_event: Callable[[ApiError], bytes | Event]
    content_type: str = "application/json"


OPENAI = Dialect(error_body=ApiError.body, error_event=ApiError.body)
