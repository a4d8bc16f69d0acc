"""The vocabulary that an ASGI 3 server and application share.

Two exceptions extend the specification: with them our applications report to the server how a
request ended.  Other ASGI servers treat them as ordinary exceptions.

An http.response.start may also have a "ping", a part of the body without meaning to the client.
The server sends it when the client has closed its half of the connection: a client that is gone
answers with a reset.
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

# The key of a function in the scopes of our server: it takes a function to call when the client
# goes away, or None to call none.  It saves the application a task that waits for http.disconnect.
ON_DISCONNECT = "llmsrv.on_disconnect"


class ClientDisconnected(Exception):
    """The client went away before its response was complete: no one's fault, and not logged."""


class StreamBroken(Exception):
    """The stream failed, and the application has sent an error event in the body.

    The server closes the connection without the final chunk, so that a client that overlooks the
    error event does not mistake the body for a complete one.
    """
