"""h11 accepts whatever the strict check accepts, and reads it the same way."""

import h11
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from llmsrv.errors import ApiError
from llmsrv.server.body import ChunkedBody
from llmsrv.server.head import parse_head
from llmsrv.server.settings import ServerSettings

TOKEN = "!#$%&'*+-.^_`|~019azAZ"
names = st.one_of(
    st.text(TOKEN, min_size=1, max_size=12),
    st.sampled_from(["Host", "Connection", "Upgrade", "Content-Length", "Transfer-Encoding"]),
)
values = st.text("\t !az09,;=\"\x7f\x80\xff\x0b", max_size=12)
heads = st.builds(
    lambda method, target, minor, fields: (
        f"{method} {target} HTTP/1.{minor}\r\nHost: h\r\n"
        + "".join(f"{name}:{value}\r\n" for name, value in fields)
        + "\r\n"
    ).encode("latin-1"),
    st.text(TOKEN, min_size=1, max_size=34),
    st.text("/?#*ahtp:%~\x80", min_size=1, max_size=9).map(lambda text: "/" + text),
    st.integers(0, 9),
    st.lists(st.tuples(names, values), max_size=5),
)


@settings(max_examples=100)
@given(heads)
def test_h11_accepts_what_the_strict_check_accepts(data: bytes) -> None:
    try:
        head = parse_head(data, ServerSettings())
    except ApiError as error:
        assert 400 <= error.status <= 505
        return
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(data)
    request = connection.next_event()
    assert isinstance(request, h11.Request)
    assert (head.method.encode(), head.headers) == (request.method, list(request.headers))
    query = b"?" + head.query_string if b"?" in request.target else b""
    assert head.raw_path + query == request.target
    if head.body.is_complete:
        assert isinstance(connection.next_event(), h11.EndOfMessage)


@given(
    chunks=st.lists(st.binary(min_size=1, max_size=40), max_size=8),
    extension=st.sampled_from(["", ";a", ";a=b", ';a="b c"']),
    places=st.lists(st.integers(0, 400), max_size=8),
)
def test_h11_decodes_the_same_chunks(
    chunks: list[bytes], extension: str, places: list[int]
) -> None:
    data = b"".join(b"%x%b\r\n%b\r\n" % (len(c), extension.encode(), c) for c in chunks)
    data += b"0\r\nX: y\r\n\r\n"
    body = ChunkedBody(limit_bytes=1000)
    buffer = bytearray()
    decoded = b""
    bounds = [0, *sorted(place % len(data) for place in places), len(data)]
    for start, end in zip(bounds, bounds[1:]):
        buffer += data[start:end]
        decoded += body.read(buffer)
    assert body.is_complete and not buffer
    assert decoded == b"".join(chunks) == decoded_by_h11(data)


def decoded_by_h11(data: bytes) -> bytes:
    connection = h11.Connection(h11.SERVER)
    head = b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
    connection.receive_data(head + data)
    decoded = b""
    while not isinstance(event := connection.next_event(), h11.EndOfMessage):
        if isinstance(event, h11.Data):
            decoded += event.data
    return decoded
