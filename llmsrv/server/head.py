"""The head of a request: a strict check, and then h11 as the parser.

h11 0.16 is too lenient for a server on an open network: it accepts Content-Length together with
Transfer-Encoding, bare LF, folded lines, control characters in values, a malformed Host, HTTP/2.0.
Different parsers read such input differently, and that is how requests are smuggled.  So our
check comes first.  It only refuses requests; it never changes them.
"""

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import unquote

import h11

from llmsrv.errors import ApiError
from llmsrv.server.body import BodyReader
from llmsrv.server.body import ChunkedBody
from llmsrv.server.body import LengthBody
from llmsrv.server.body import body_too_large
from llmsrv.server.settings import ServerSettings

TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]"
REQUEST_LINE = re.compile(rb"(%b{1,32}) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])" % TOKEN)
# RFC 9112 section 5: no space before the colon, no folding.  Values hold visible characters,
# spaces, tabs, and opaque bytes from 0x80 up.
FIELDS = re.compile(rb"(?:%b+:[\t\x20-\x7e\x80-\xff]*\r\n)*" % TOKEN)
# An unfinished head must already match this, so that garbage is refused before any deadline.
METHOD_START = re.compile(rb"%b{1,32}(?: |\Z)" % TOKEN)
BARE_LINE_END = re.compile(rb"(?<!\r)\n|\r[^\n]")

MAX_METHOD_BYTES = 32
MAX_HOST_BYTES = 255
HOST = re.compile(rb"([0-9A-Za-z._~-]+|\[[0-9A-Fa-f:.]+\])(?::([0-9]{0,5}))?")
ABSOLUTE_FORM = re.compile(rb"https?://([^/?]*)([^?]*)(.*)", re.IGNORECASE)
ORIGIN = re.compile(rb"\r\norigin:[ \t]*([\x21-\x7e]+)[ \t]*\r\n", re.IGNORECASE)
# More than 19 digits may not fit 64 bits at the next hop.  A leading zero does not mean octal.
CONTENT_LENGTH = re.compile(rb"[0-9]{1,19}")

ONCE = frozenset(
    (b"host", b"content-length", b"transfer-encoding", b"content-type", b"authorization")
)
# Servers that turn `_` into `-` (CGI and its descendants) would read these as framing.
LOOKALIKES = frozenset((b"content_length", b"transfer_encoding"))

Field = tuple[bytes, bytes]


@dataclass(slots=True)
class RequestHead:
    """A request up to its body, in the form the ASGI scope needs.

    http_version  "1.0", or "1.1" for 1.1 to 1.9 (RFC 9110 section 2.5)
    body          reads the body that follows from the connection's buffer
    """

    method: str
    path: str
    raw_path: bytes
    query_string: bytes
    http_version: str
    headers: list[Field]
    keep_alive: bool
    expects_continue: bool
    body: BodyReader


class HeadReader:
    """Takes heads off the front of a connection's buffer.

    Each byte is examined a bounded number of times, however small the reads are.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._searched = 0  # bytes at the front of the buffer known to hold no blank line
        self._line_is_checked = False

    def read(self, buffer: bytearray) -> RequestHead | None:
        """Returns the next head and removes it from the buffer; None while it is incomplete.

        Raises ApiError 400, 405, 413, 414, 417, 431, 501 or 505 and leaves the buffer as it is.
        The connection must then be closed, as nothing says where the next request would begin.
        """
        # One empty line before the request line is tolerated (RFC 9112 section 2.2).
        start = 2 if buffer.startswith(b"\r\n") else 0
        end = buffer.find(b"\r\n\r\n", max(start, self._searched - 3))
        if end < 0:
            self._check_unfinished(buffer, start)
            self._searched = len(buffer)
            return None
        head = parse_head(bytes(buffer[start : end + 4]), self._settings)
        del buffer[: end + 4]
        self._searched = 0
        self._line_is_checked = False
        return head

    def _check_unfinished(self, buffer: bytearray, start: int) -> None:
        """Refuses input that cannot become a valid head, without waiting for the deadline."""
        if len(buffer) == start or buffer == b"\r":
            return
        if not METHOD_START.match(buffer[start : start + MAX_METHOD_BYTES + 1]):
            raise bad_request("The request line is malformed.")
        if BARE_LINE_END.search(buffer, max(0, self._searched - 1)):
            raise bad_request("Lines must end with CRLF.")
        line_end = buffer.find(b"\r\n", start)
        if line_end < 0:
            _check_line_size(len(buffer) - start, self._settings)
            return
        if not self._line_is_checked:
            _check_line_size(line_end - start, self._settings)
            _check_request_line(bytes(buffer[start:line_end]))
            self._line_is_checked = True
        if len(buffer) - line_end - 2 > self._settings.max_header_bytes:
            raise _headers_too_large()


def find_origin(buffer: bytearray) -> bytes | None:
    """The value of Origin in a head that was refused, of which the buffer may hold only a part."""
    match = ORIGIN.search(buffer.partition(b"\r\n\r\n")[0] + b"\r\n")
    return match[1] if match else None


def parse_head(head: bytes, settings: ServerSettings) -> RequestHead:
    """Checks and parses a complete head with its blank line; raises like HeadReader.read."""
    line, _, block = head.partition(b"\r\n")
    _check_line_size(len(line), settings)
    method, target, is_http_1_0 = _check_request_line(line)
    block_bytes = len(block) - 2
    if block_bytes > settings.max_header_bytes or block.count(b"\n") - 1 > settings.max_fields:
        raise _headers_too_large()
    if not FIELDS.fullmatch(block, 0, block_bytes):
        raise bad_request("A header field is malformed.")
    fields = _split(block[:block_bytes])
    values = dict(fields)
    _check_names(fields, values)
    authority, raw_path, query = _split_target(method, target)
    _check_host(values.get(b"host"), authority, is_http_1_0)
    body = _body_reader(values, is_http_1_0, settings.body_limit_bytes)
    expects_continue = not is_http_1_0 and _expects_continue(values.get(b"expect"))
    headers = _parse_with_h11(head)
    if authority is not None and b"host" not in values:
        headers.append((b"host", authority))
    return RequestHead(
        method=method.decode(),
        path=unquote(raw_path.decode()) if b"%" in raw_path else raw_path.decode(),
        raw_path=raw_path,
        query_string=query,
        http_version="1.0" if is_http_1_0 else "1.1",
        headers=headers,
        keep_alive=not is_http_1_0 and not _asks_to_close(fields),
        expects_continue=expects_continue and not body.is_complete,
        body=body,
    )


def _parse_with_h11(head: bytes) -> list[Field]:
    # Each head needs a new h11 connection: h11 does not see our responses, so its state machine
    # would never reach the next request.
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(head)
    try:
        request = connection.next_event()
    except h11.RemoteProtocolError as error:
        raise ApiError(error.error_status_hint, "The request head is malformed.") from None
    assert isinstance(request, h11.Request)
    return list(request.headers)


def bad_request(message: str) -> ApiError:
    return ApiError(400, message)


def _headers_too_large() -> ApiError:
    return ApiError(431, "The header fields are too many or too large.")


def _check_line_size(size: int, settings: ServerSettings) -> None:
    if size > settings.max_request_line_bytes:
        raise ApiError(414, "The request target is too long.")


def _check_request_line(line: bytes) -> tuple[bytes, bytes, bool]:
    """Returns the method, the target, and whether it is HTTP/1.0."""
    match = REQUEST_LINE.fullmatch(line)
    if not match:
        raise bad_request("The request line is malformed.")
    method, target, major, minor = match.groups()
    if major != b"1":
        raise ApiError(505, "This server speaks HTTP/1.1.")
    if method == b"CONNECT":
        # Allow is empty: no method works on a CONNECT target (RFC 9110 section 10.2.1).
        raise ApiError(405, "This server is no proxy.", headers={"Allow": ""})
    return method, target, minor == b"0"


def _split(block: bytes) -> list[Field]:
    pairs = [line.split(b":", 1) for line in block.split(b"\r\n")[:-1]]
    return [(name.lower(), value.strip(b" \t")) for name, value in pairs]


def _check_names(fields: list[Field], values: dict[bytes, bytes]) -> None:
    if not LOOKALIKES.isdisjoint(values):
        raise bad_request("A framing header field is spelled with an underscore.")
    if len(values) < len(fields):
        names = [name for name, _ in fields]
        for name in ONCE:
            if names.count(name) > 1:
                raise bad_request(f"The header field {name.decode()} may be sent only once.")


def _split_target(method: bytes, target: bytes) -> tuple[bytes | None, bytes, bytes]:
    """Returns authority (absolute form only), raw path and query (RFC 9112 section 3.2)."""
    authority = None
    if target == b"*" and method == b"OPTIONS":
        return None, target, b""
    if not target.startswith(b"/"):
        match = ABSOLUTE_FORM.fullmatch(target)
        if not match:
            raise bad_request("The request target is malformed.")
        authority, path, query = match.groups()
        target = (path or b"/") + query
    if b"#" in target:
        raise bad_request("The request target is malformed.")
    path, _, query = target.partition(b"?")
    return authority, path, query


def _check_host(host: bytes | None, authority: bytes | None, is_http_1_0: bool) -> None:
    """RFC 9112 section 3.2.  An authority in the target overrides Host, so they must agree."""
    if host is None and not is_http_1_0:
        raise bad_request("The header field Host is missing.")
    for name in (host, authority):
        if name is not None and not _is_host(name):
            raise bad_request("The host is malformed.")
    if host is not None and authority is not None and host.lower() != authority.lower():
        raise bad_request("The header field Host and the request target name different hosts.")


def _is_host(value: bytes) -> bool:
    match = HOST.fullmatch(value)
    if not match or len(value) > MAX_HOST_BYTES or int(match[2] or 0) > 65535:
        return False
    return not match[1].startswith(b"[") or _is_ipv6(match[1][1:-1].decode())


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def _body_reader(values: dict[bytes, bytes], is_http_1_0: bool, limit_bytes: int) -> BodyReader:
    """Finds out how the body is framed (RFC 9112 section 6); refuses what is ambiguous."""
    length = values.get(b"content-length")
    codings = values.get(b"transfer-encoding")
    if codings is not None:
        if length is not None:
            raise bad_request("Content-Length and Transfer-Encoding exclude each other.")
        if is_http_1_0:
            raise bad_request("HTTP/1.0 has no Transfer-Encoding.")
        _check_codings(codings.lower())
        return ChunkedBody(limit_bytes)
    if length is None:
        return LengthBody(0)
    if not CONTENT_LENGTH.fullmatch(length):
        raise bad_request("Content-Length is malformed.")
    if int(length) > limit_bytes:
        raise body_too_large(limit_bytes)
    return LengthBody(int(length))


def _check_codings(value: bytes) -> None:
    """Accepts only a single `chunked`; raises 501 for other codings, 400 for nonsense."""
    if value == b"chunked":
        return
    names = [coding.partition(b";")[0].strip(b" \t") for coding in value.split(b",")]
    if b"" in names or b"chunked" in names[:-1] or value.rpartition(b";")[0].endswith(b"chunked"):
        raise bad_request("Transfer-Encoding is malformed.")
    raise ApiError(501, "Of the transfer codings only chunked is implemented.")


def _expects_continue(expect: bytes | None) -> bool:
    if expect is not None and expect.lower() != b"100-continue":
        raise ApiError(417, "Of the expectations only 100-continue can be met.")
    return expect is not None


def _asks_to_close(fields: list[Field]) -> bool:
    options = b",".join(value for name, value in fields if name == b"connection").lower()
    return b"close" in [option.strip(b" \t") for option in options.split(b",")]
