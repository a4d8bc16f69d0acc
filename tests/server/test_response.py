"""Responses are framed as h11 frames them."""

from collections.abc import Callable
from collections.abc import Sequence

import h11
import pytest

from llmsrv.server.response import ResponseWriter

STREAM = [b'data: {"a":1}\n\n', b"", b"x" * 4096, b"\r\n0\r\n\r\n"]
CASES = [
    ("GET", "1.1", 200, None, STREAM),
    ("GET", "1.1", 200, None, [b"whole"]),
    ("GET", "1.1", 200, None, []),
    ("GET", "1.1", 200, 7, [b"abc", b"", b"defg"]),
    ("POST", "1.1", 404, 2, [b"no"]),
    ("GET", "1.1", 204, None, []),
    ("GET", "1.1", 304, None, []),
    ("HEAD", "1.1", 200, 3, [b"abc"]),
    ("HEAD", "1.1", 200, None, STREAM),
    ("GET", "1.0", 200, None, STREAM),
    ("GET", "1.0", 200, 3, [b"abc"]),
]


def by_us(
    method: str, version: str, status: int, length: int | None, body: Sequence[bytes]
) -> tuple[bytes, list[bytes]]:
    """Returns the bytes before the body, and those of each part of the body."""
    writer = ResponseWriter(method, version)
    length_header = [] if length is None else [(b"content-length", b"%d" % length)]
    writer.start(status, [(b"x-one", b"1"), *length_header])
    parts = [writer.body(data, True, close=version == "1.0") for data in (b"", *body)]
    parts.append(writer.body(b"", False, close=version == "1.0"))
    assert writer.is_complete
    return parts[0], parts[1:]


def by_h11(
    method: str, version: str, status: int, length: int | None, body: Sequence[bytes]
) -> tuple[bytes, list[bytes]]:
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(f"{method} / HTTP/{version}\r\nHost: h\r\n\r\n".encode())
    connection.next_event()
    length_header = [] if length is None else [(b"content-length", b"%d" % length)]
    response = h11.Response(status_code=status, headers=[(b"x-one", b"1"), *length_header])
    head = connection.send(response)
    events = [*(h11.Data(data=data) for data in body), h11.EndOfMessage()]
    no_body = method == "HEAD" or status in (204, 304)
    parts = [b"" if no_body else connection.send(event) for event in events]
    assert head is not None
    return head, [part or b"" for part in parts]


def fields(head: bytes) -> set[bytes]:
    lines = head.lower().split(b"\r\n")[1:]
    return {line for line in lines if not line.startswith(b"date:")}


@pytest.mark.parametrize("case", CASES, ids=[f"{c[0]}-{c[1]}-{c[2]}-{c[3]}" for c in CASES])
def test_a_response_in_parts_equals_that_of_h11(
    case: tuple[str, str, int, int | None, Sequence[bytes]]
) -> None:
    head, parts = by_us(*case)
    h11_head, h11_parts = by_h11(*case)
    # h11 frames an empty 204 or 304 as if a body could follow; RFC 9110 section 8.6 forbids it.
    framing = b"transfer-encoding: chunked" if case[2] in (204, 304) else b"nothing"
    assert fields(head) == fields(h11_head) - {framing}
    assert parts == h11_parts


@pytest.mark.parametrize("body", [b"", b"abc"])
def test_a_body_sent_at_once_has_a_content_length(body: bytes) -> None:
    writer = ResponseWriter("GET", "1.1")
    writer.start(200, [])
    head, _, rest = writer.body(body, False, close=False).partition(b"\r\n\r\n")
    assert b"content-length: %d" % len(body) in fields(head) and rest == body


@pytest.mark.parametrize(
    "messages",
    [
        pytest.param(["body"], id="body-before-start"),
        pytest.param(["start", "start"], id="two-starts"),
        pytest.param(["start", "last", "last"], id="body-after-the-end"),
        pytest.param(["start", "last", "start"], id="start-after-the-end"),
    ],
)
def test_messages_out_of_order_raise_in_the_application(messages: list[str]) -> None:
    writer = ResponseWriter("GET", "1.1")
    steps: dict[str, Callable[[], object]] = {
        "start": lambda: writer.start(200, []),
        "body": lambda: writer.body(b"x", True, False),
        "last": lambda: writer.body(b"x", False, False),
    }
    for message in messages[:-1]:
        steps[message]()
    with pytest.raises(RuntimeError):
        steps[messages[-1]]()


@pytest.mark.parametrize("value", [b"a\nb", b"a\rb", b"a\r\nb", b"a\0b"])
def test_a_header_cannot_split_the_head(value: bytes) -> None:
    writer = ResponseWriter("GET", "1.1")
    writer.start(200, [(b"x", value)])
    with pytest.raises(RuntimeError):
        writer.body(b"", False, close=False)


def test_a_status_without_a_standard_phrase_is_sent() -> None:
    writer = ResponseWriter("GET", "1.1")
    writer.start(299, [])
    assert writer.body(b"", False, close=False).startswith(b"HTTP/1.1 299 \r\n")
