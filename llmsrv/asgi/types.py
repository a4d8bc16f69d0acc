"""The words that an ASGI 3 server and application share.

Beside the names of the specification there are two exceptions by which our applications tell the
server how a request ended; under another ASGI server they are ordinary exceptions.  And an
http.response.start may have "ping", a part of the body that says nothing: the server sends it when
the client has closed its half, since one that is gone answers that with a reset.
"""

from collections.abc import Awaitable
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

Scope = dict[str, Any]
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

# Header fields as ASGI carries them: names in lower case, values as the bytes on the wire.
RawHeaders = Sequence[tuple[bytes, bytes]]


class ClientDisconnected(Exception):
    """The client went away before its answer was complete: nobody's fault, and nothing to log."""


class StreamBroken(Exception):
    """The application told the client inside the body that the stream failed.

    The server closes the connection without the final chunk, so that a client which overlooks the
    error event still does not take the body for complete.
    """
