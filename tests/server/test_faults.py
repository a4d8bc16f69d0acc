"""What comes in on a socket and what goes out: tables with a row for each case."""

import json
from collections.abc import Iterator

import pytest

from llmsrv.asgi.types import RawHeaders
from llmsrv.asgi.types import Scope
from llmsrv.server.settings import ServerSettings
from tests.support.asgi_apps import echo
from tests.support.parameters import slow_but
from tests.support.serving import LOOPS
from tests.support.serving import Serving
from tests.support.serving import parse_answers
from tests.support.serving import recording
from tests.support.serving import serving

H = b"Host: h\r\n"
LAST = b"GET /last HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
KB = 1024


def get(target: bytes = b"/", fields: bytes = H, version: bytes = b"1.1") -> bytes:
    return b"GET %b HTTP/%b\r\n%b\r\n" % (target, version, fields)


def post(fields: bytes, body: bytes = b"", version: bytes = b"1.1") -> bytes:
    return b"POST / HTTP/%b\r\nHost: h\r\n%b\r\n%b" % (version, fields, body)


def chunked(body: bytes) -> bytes:
    return post(b"Transfer-Encoding: chunked\r\n", body)


# Each is refused with exactly one error object, and the connection closes even though the client
# sends nothing more, not even FIN.  Bytes after the fault must never be read as a request.
REFUSED = [
    ("1-http-0.9", b"GET /\r\n", 400),
    ("2-http-0.9-spelled-out", get(version=b"0.9"), 505),
    ("2-http-2.0", get(version=b"2.0"), 505),
    ("2-http-3.0", get(version=b"3.0"), 505),
    ("2-version-01.1", get(version=b"01.1"), 400),
    ("2-version-1", get(version=b"1"), 400),
    ("2-lower-case-http", b"GET / http/1.1\r\n" + H + b"\r\n", 400),
    ("2-space-in-version", get(version=b" 1.1"), 400),
    ("3-http-2-preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    ("4-two-leading-empty-lines", b"\r\n\r\n" + get(), 400),
    ("4-leading-space", b" " + get(), 400),
    ("5-tls-client-hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64), 400),
    ("6-double-space", b"GET  / HTTP/1.1\r\n" + H + b"\r\n", 400),
    ("6-tab", b"GET\t/ HTTP/1.1\r\n" + H + b"\r\n", 400),
    ("6-trailing-space", b"GET / HTTP/1.1 \r\n" + H + b"\r\n", 400),
    ("6-no-target", b"GET HTTP/1.1\r\n" + H + b"\r\n", 400),
    ("6-nul", b"GET /\0 HTTP/1.1\r\n" + H + b"\r\n", 400),
    ("6-cr-only-line-ends", b"GET / HTTP/1.1\rHost: h\r\r", 400),
    ("7-authority-unlike-host", get(b"http://other/x"), 400),
    ("7-absolute-form-with-userinfo", get(b"http://me@h/x"), 400),
    ("7-absolute-form-of-ftp", get(b"ftp://h/x"), 400),
    ("8-authority-form", get(b"h:80"), 400),
    ("8-relative-target", get(b"foo"), 400),
    ("8-exclamation-mark", get(b"!"), 400),
    ("8-fragment", get(b"/a#b"), 400),
    ("8-non-ascii-target", get(b"/\xc3\xa9"), 400),
    ("9-star-with-get", get(b"*"), 400),
    ("10-connect", b"CONNECT h:443 HTTP/1.1\r\n" + H + b"\r\n", 405),
    ("11-method-of-33-bytes", b"M" * 33 + b" / HTTP/1.1\r\n" + H + b"\r\n", 400),
    ("11-method-without-end", b"M" * 33, 400),
    ("13-target-over-8-kib", get(b"/" + b"x" * 8 * KB), 414),
    ("13-target-without-end", b"GET /" + b"x" * 9 * KB, 414),
    ("16-garbage", bytes(range(128, 256)), 400),
    ("17-no-host", get(fields=b""), 400),
    ("18-two-hosts", get(fields=H + b"Host: i\r\n"), 400),
    ("18-same-host-twice", get(fields=H + H), 400),
    ("18-list-of-hosts", get(fields=b"Host: a, b\r\n"), 400),
    *[
        (f"19-host-{host!r}", get(fields=b"Host: %b\r\n" % host), 400)
        for host in (
            *(b"", b"a/b", b"a?b", b"a#b", b"a@b", b"a\\b", b"a b", b"h:x", b"h:65536", b":80"),
            *(b"[::1", b"::1", b"[1:2]", b"[::g]", b"[1.2.3.4]", b"h" * 256, b"h\xc3\xa9"),
        )
    ],
    ("21-space-before-colon", get(fields=H + b"Name : v\r\n"), 400),
    ("21-space-before-first-field", get(fields=b" " + H), 400),
    ("21-no-colon", get(fields=H + b"Name\r\n"), 400),
    ("21-empty-name", get(fields=H + b": v\r\n"), 400),
    ("21-non-token-name", get(fields=H + b"Na(me: v\r\n"), 400),
    ("21-non-ascii-name", get(fields=H + b"Nam\xe9: v\r\n"), 400),
    *[
        (f"22-control-{code:#04x}", get(fields=H + b"X: a%cb\r\n" % code), 400)
        for code in (*range(0x00, 0x09), *range(0x0B, 0x20), 0x7F)
    ],
    ("23-obs-fold", get(fields=H + b"X: a\r\n b\r\n"), 400),
    ("23-obs-fold-by-tab", get(fields=H + b"X: a\r\n\tb\r\n"), 400),
    ("24-bare-lf", b"GET / HTTP/1.1\nHost: h\n\n", 400),
    ("24-mixed-line-ends", b"GET / HTTP/1.1\r\nHost: h\n\r\n", 400),
    ("24-crlf-then-lf", b"GET / HTTP/1.1\r\nHost: h\r\n\n", 400),
    ("25-header-block-of-33-kib", get(fields=H + b"X: %b\r\n" % (b"x" * 1000) * 33), 431),
    ("26-101-fields", get(fields=H + b"a:\r\n" * 100), 431),
    ("26-20000-fields", get(fields=H + b"a:\r\n" * 20_000), 431),
    ("27-name-of-100-kb", get(fields=H + b"N" * 100_000 + b": v\r\n"), 431),
    ("27-value-of-100-kb", get(fields=H + b"N: " + b"v" * 100_000 + b"\r\n"), 431),
    ("28-content-length-by-underscore", post(b"Content_Length: 1\r\n", b"x"), 400),
    ("28-transfer-encoding-by-underscore", post(b"Transfer_Encoding: chunked\r\n"), 400),
    ("28-content-length-x85", post(b"Content-Length\x85: 1\r\n", b"x"), 400),
    ("28-xa0-chunked", post(b"Transfer-Encoding: \xa0chunked\r\n", b"0\r\n\r\n"), 501),
    ("29-two-authorizations", get(fields=H + b"Authorization: a\r\nauthorization: a\r\n"), 400),
    ("29-two-content-types", get(fields=H + b"Content-Type: a/b\r\nContent-Type: a/b\r\n"), 400),
    ("31-unknown-expectation", post(b"Expect: 200-ok\r\nContent-Length: 1\r\n"), 417),
    (
        "37-content-length-and-transfer-encoding",
        post(b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n" + LAST),
        400,
    ),
    ("38-differing-lengths", post(b"Content-Length: 1\r\nContent-Length: 2\r\n", b"x" + LAST), 400),
    ("38-same-length-twice", post(b"Content-Length: 1\r\nContent-Length: 1\r\n", b"x" + LAST), 400),
    ("38-list-of-lengths", post(b"Content-Length: 5, 5\r\n", b"hello" + LAST), 400),
    *[
        (f"39-length-{value.decode('latin-1')}", post(b"Content-Length: %b\r\n" % value, LAST), 400)
        for value in (
            *(b"+5", b"-1", b"-0", b"0x5", b"0o5", b"1_0", b"5-", b'""', b"5,", b",5", b'"5"'),
            *(b"\xbd", b"", b"5 5", b"1" * 20),
        )
    ],
    ("40-length-over-the-limit", post(b"Content-Length: 999999999\r\n"), 413),
    (
        "40-length-over-the-limit-with-expect",
        post(b"Content-Length: 999999999\r\nExpect: 100-continue\r\n"),
        413,
    ),
    *[
        (f"41-coding-{value!r}", post(b"Transfer-Encoding: %b\r\n" % value, b"0\r\n\r\n"), status)
        for value, status in (
            *((b"xchunked", 501), (b"gzip, chunked", 501), (b"chunked, chunked", 400)),
            *((b"chunked;x=1", 400), (b"identity", 501), (b"", 400), (b",chunked", 400)),
            *((b"\x0bchunked", 400), (b"chunked, gzip", 400), (b"chunked,", 400)),
        )
    ],
    (
        "41-two-transfer-encodings",
        post(b"Transfer-Encoding: chunked\r\n" * 2, b"0\r\n\r\n"),
        400,
    ),
    (
        "42-transfer-encoding-in-1.0",
        post(b"Transfer-Encoding: chunked\r\n", b"0\r\n\r\n", version=b"1.0"),
        400,
    ),
    *[
        (f"43-chunk-size-{size!r}", chunked(size + b"\r\nx\r\n0\r\n\r\n" + LAST), 400)
        for size in (
            *(b"0x1", b"+1", b"-1", b"1_0", b" 1", b"1 ", b"", b"G", b"0" * 16 + b"1", b"1\t"),
        )
    ],
    ("43-chunk-over-the-limit", chunked(b"f" * 16 + b"\r\n"), 413),
    ("44-no-crlf-after-chunk", chunked(b"1\r\nxyz\r\n0\r\n\r\n"), 400),
    ("44-chunk-too-long", chunked(b"1\r\nxx\r\n0\r\n\r\n"), 400),
    ("44-chunk-too-short", chunked(b"2\r\nx\r\n0\r\n\r\n"), 400),
    *[
        (f"45-extension-{extension!r}", chunked(b"1" + extension + b"\r\nx\r\n0\r\n\r\n"), 400)
        for extension in (b";a\rb", b";a\nb", b";a\0b", b";", b";a=", b"; a", b";" + b"a" * 300)
    ],
    ("45-chunks-of-a-byte", chunked(b"1\r\nx\r\n" * 20_000), 400),
    ("46-bare-lf-after-size", chunked(b"1\nx\r\n0\r\n\r\n"), 400),
    ("46-bare-lf-after-data", chunked(b"1\r\nx\n0\r\n\r\n"), 400),
    ("46-bare-lf-as-trailer-end", chunked(b"0\r\n\n"), 400),
    *[
        (f"47-trailer-{name.decode()}", chunked(b"0\r\n%b: 1\r\n\r\n" % name), 400)
        for name in (
            *(b"Content-Length", b"Transfer-Encoding", b"Host", b"Authorization", b"CONTENT-TYPE"),
        )
    ],
    ("47-malformed-trailer", chunked(b"0\r\nName : v\r\n\r\n"), 400),
    ("47-trailers-over-8-kib", chunked(b"0\r\n" + b"T: %b\r\n" % (b"x" * 1000) * 9 + b"\r\n"), 400),
    ("48-chunked-body-over-the-limit", chunked(b"10000\r\n" + b"x" * 65536 + b"\r\n1\r\n"), 413),
    ("56-cl-te", post(b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n", LAST), 400),
    (
        "56-smuggled-after-an-obsolete-extension",
        chunked(b"2;\rxx\r\n4c\r\n0\r\n\r\n" + LAST + b"\r\n0\r\n\r\n"),
        400,
    ),
]

# Each is served in order, and so is the next request on the same connection.  The last column is
# what the application sees of every request: method, raw path, query, body.
SERVED = [
    ("2-http-1.2", get(version=b"1.2"), [("GET", b"/", b"", b"")]),
    ("2-http-1.9", get(version=b"1.9"), [("GET", b"/", b"", b"")]),
    ("4-leading-empty-line", b"\r\n" + get(), [("GET", b"/", b"", b"")]),
    ("7-absolute-form", get(b"http://h/x?y", b"Host: H\r\n"), [("GET", b"/x", b"y", b"")]),
    ("7-absolute-form-without-path", get(b"HTTP://h"), [("GET", b"/", b"", b"")]),
    ("9-options-star", b"OPTIONS * HTTP/1.1\r\n" + H + b"\r\n", [("OPTIONS", b"*", b"", b"")]),
    ("11-unknown-method", b"BREW / HTTP/1.1\r\n" + H + b"\r\n", [("BREW", b"/", b"", b"")]),
    (
        "13-target-of-8000-octets",
        get(b"/" + b"x" * 7999),
        [("GET", b"/" + b"x" * 7999, b"", b"")],
    ),
    *[
        (f"14-path-{path.decode()}", get(path), [("GET", path, b"", b"")])
        for path in (
            *(b"/%00", b"/%0d%0a", b"/%c0%af", b"/\\", b"//v1/x", b"/v1/../metrics", b"/%2e%2e"),
            *(b"/;x=1", b"/V1/", b"/v1/"),
        )
    ],
    (
        "15-1000-query-parameters",
        get(b"/?" + b"&".join([b"a=1"] * 1000)),
        [("GET", b"/", b"&".join([b"a=1"] * 1000), b"")],
    ),
    *[
        (f"19-host-{host!r}", get(fields=b"Host: %b\r\n" % host), [("GET", b"/", b"", b"")])
        for host in (b"localhost", b"1.2.3.4:80", b"[::1]:8000", b"a_b.example.:65535", b"h:")
    ],
    ("22-tab-and-obs-text", get(fields=H + b"X: a\tb\xe9\r\n"), [("GET", b"/", b"", b"")]),
    ("26-100-fields", get(fields=H + b"a:\r\n" * 99), [("GET", b"/", b"", b"")]),
    (
        "32-ignored-fields",
        get(fields=H + b"Range: bytes=0-1\r\nIf-Match: x\r\nTE: trailers\r\nAccept: nonsense\r\n"),
        [("GET", b"/", b"", b"")],
    ),
    *[
        (f"36-upgrade-{fields!r}", get(fields=H + fields), [("GET", b"/", b"", b"")])
        for fields in (
            b"Upgrade: h2c\r\n",
            b"Connection: upgrade\r\nUpgrade: websocket\r\n",
            b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n",
        )
    ],
    (
        "39-leading-zeros-are-decimal",
        post(b"Content-Length: 0000000000000000010\r\n", b"0123456789"),
        [("POST", b"/", b"", b"0123456789")],
    ),
    (
        "43-sizes-in-either-case",
        chunked(b"A\r\n0123456789\r\n00a\r\n0123456789\r\n0\r\n\r\n"),
        [("POST", b"/", b"", b"0123456789" * 2)],
    ),
    (
        "45-extensions",
        chunked(b'1;a;b=c;d="e;\\" f"\r\nx\r\n0;last\r\n\r\n'),
        [("POST", b"/", b"", b"x")],
    ),
    ("47-trailers", chunked(b"1\r\nx\r\n0\r\nX-Sum: 1\r\n\r\n"), [("POST", b"/", b"", b"x")]),
    (
        "50-get-with-body",
        get(fields=H + b"Content-Length: 22\r\n") + b"GET /smuggled HTTP/1.1",
        [("GET", b"/", b"", b"GET /smuggled HTTP/1.1")],
    ),
    ("53-two-pipelined", get(b"/1") + get(b"/2"), [("GET", p, b"", b"") for p in (b"/1", b"/2")]),
    (
        "53-1000-pipelined",
        b"".join(get(b"/%d" % i) for i in range(1000)),
        [("GET", b"/%d" % i, b"", b"") for i in range(1000)],
    ),
    (
        "56-0.cl",
        post(b"Content-Length: 0\r\n", get(b"/next")),
        [("POST", b"/", b"", b""), ("GET", b"/next", b"", b"")],
    ),
]

SILENT = [
    ("16-nothing-then-fin", b""),
    ("16-one-byte-then-fin", b"G"),
    ("16-half-a-head-then-fin", b"GET / HTTP/1.1\r\nHo"),
    ("49-half-a-body-then-fin", post(b"Content-Length: 10\r\n", b"12345")),
    ("49-half-a-chunk-then-fin", chunked(b"5\r\n123")),
]

scopes: list[Scope] = []


@pytest.fixture(scope="module", params=slow_but(LOOPS, "uvloop"))
def server(request: pytest.FixtureRequest) -> Iterator[Serving]:
    settings = ServerSettings(body_limit_bytes=65536, linger_timeout_s=0.2)
    with serving(recording(scopes), settings, request.param) as running:
        yield running


@pytest.mark.parametrize(("data", "status"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_a_fault_is_refused_once_and_the_connection_closes(
    server: Serving, data: bytes, status: int
) -> None:
    scopes.clear()
    (answer,) = server.exchange(data)
    assert answer.status == status
    assert answer.headers["connection"] == "close"
    assert len(answer.headers["x-request-id"]) == 32
    error = json.loads(answer.body)["error"]
    assert list(error) == ["message", "type", "param", "code"] and error["code"]
    assert [scope for scope in scopes if scope["body"] is not None] == []


@pytest.mark.parametrize(("data", "seen"), [r[1:] for r in SERVED], ids=[r[0] for r in SERVED])
def test_a_request_is_served_and_the_connection_stays_open(
    server: Serving, data: bytes, seen: list[tuple[str, bytes, bytes, bytes]]
) -> None:
    scopes.clear()
    answers = server.exchange(data + LAST)
    assert [answer.status for answer in answers] == [200] * (len(seen) + 1)
    # An application from the previous test may notice only now that its client left.
    whole = [scope for scope in scopes if scope["body"] is not None]
    requests = [(s["method"], s["raw_path"], s["query_string"], s["body"]) for s in whole]
    assert requests == [*seen, ("GET", b"/last", b"", b"")]
    assert "connection" not in answers[0].headers


@pytest.mark.parametrize("data", [row[1] for row in SILENT], ids=[row[0] for row in SILENT])
def test_half_a_request_and_fin_is_closed_without_a_response(server: Serving, data: bytes) -> None:
    scopes.clear()
    with server.connect() as client:
        client.send(data)
        client.finish()
        assert client.read_to_end() == b""
    assert [scope for scope in scopes if scope["body"] is not None] == []


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(get(fields=b"", version=b"1.0"), id="17-http-1.0-without-host"),
        pytest.param(get(version=b"1.0"), id="35-http-1.0"),
        pytest.param(
            get(version=b"1.0", fields=H + b"Connection: keep-alive\r\n"), id="35-1.0-keep-alive"
        ),
        pytest.param(get(fields=H + b"Connection: X-Foo, Close\r\n"), id="35-connection-close"),
        pytest.param(
            get(fields=H + b"Connection: a\r\nConnection: close\r\n"), id="35-in-two-fields"
        ),
    ],
)
def test_one_response_and_then_the_connection_closes(server: Serving, data: bytes) -> None:
    (answer,) = server.exchange(data + LAST)
    assert (answer.status, answer.headers["connection"]) == (200, "close")


def test_7_an_absolute_form_sets_the_host_of_an_http_1_0_request(server: Serving) -> None:
    scopes.clear()
    server.exchange(get(b"http://example:81/x", b"", b"1.0"))
    assert scopes[0]["headers"] == [(b"host", b"example:81")]


def test_12_head_has_the_headers_of_get_and_no_body(server: Serving) -> None:
    fields = H + b"Content-Length: 3\r\n"
    request = b"HEAD / HTTP/1.1\r\n%b\r\nabc" % fields + get(fields=fields) + b"abc" + LAST
    with server.connect() as client:
        client.send(request)
        head, got, last = parse_answers(client.read_to_end(), ("HEAD", "GET", "GET"))
    assert head.body == b"" and got.body == b"abc" and last.status == 200
    assert head.headers == got.headers


def test_the_scope_follows_asgi_3(server: Serving) -> None:
    scopes.clear()
    fields = H + b"X-One:  a \t\r\nx-TWO:\r\n"
    server.exchange(get(b"/a%20%C3%A9?b=%20", fields) + LAST)
    scope = scopes[0]
    assert scope["type"] == "http" and scope["asgi"]["version"] == "3.0"
    assert (scope["http_version"], scope["scheme"], scope["root_path"]) == ("1.1", "http", "")
    assert (scope["path"], scope["raw_path"]) == ("/a é", b"/a%20%C3%A9")
    assert scope["query_string"] == b"b=%20"
    assert scope["headers"] == [(b"host", b"h"), (b"x-one", b"a"), (b"x-two", b"")]
    assert scope["server"] == ("127.0.0.1", server.port) and scope["client"][0] == "127.0.0.1"
    assert scope["state"] == {} and scope["state"] is not scopes[1]["state"]


def test_refusals_are_counted(server: Serving) -> None:
    before = server.counters.refused_requests
    server.exchange(b"\x16\x03\x01")
    assert server.counters.refused_requests == before + 1


ORIGINS = [
    (b"GET / HTTP/1.1\r\n%bOrigin: http://a\r\nTE\r\n\r\n" % H, b"http://a"),
    (b"GET / HTTP/1.1\r\n%bORIGIN:\thttp://a \r\nExpect: x\r\n\r\n" % H, b"http://a"),
    (b"GET / HTTP/1.1\r\n%bOrigin: a\x01b\r\nExpect: x\r\n\r\n" % H, None),
    (b"GET / HTTP/1.1\r\n%bExpect: x\r\n\r\nOrigin: http://a\r\n" % H, None),
    (chunked(b"x\r\n").replace(b"\r\n", b"\r\nOrigin: http://a\r\n", 1), b"http://a"),
]


@pytest.mark.parametrize("request_bytes, origin", ORIGINS, ids=repr)
def test_an_error_of_the_server_itself_has_headers_that_depend_on_the_origin(
    request_bytes: bytes, origin: bytes | None
) -> None:
    def error_headers(origin: bytes | None) -> RawHeaders:
        return [(b"x-origin", origin or b"none")]

    with serving(echo, error_headers=error_headers) as server:
        (answer,) = server.exchange(request_bytes)
    assert 400 <= answer.status < 500
    assert answer.headers["x-origin"].encode() == (origin or b"none")
