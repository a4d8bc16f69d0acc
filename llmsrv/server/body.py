"""The body of a request, taken from the connection's buffer as it arrives.

We do not let h11 read bodies: in chunked bodies it accepts line ends in extensions, bare LF in the
trailer section, and any amount of framing per byte of data.
"""

import re
from enum import Enum
from typing import Protocol

from llmsrv.errors import ApiError

TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
QUOTED = rb"\"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*\""
# RFC 9112 section 7.1.1, without the optional spaces, which senders must not generate.
CHUNK_LINE = re.compile(
    rb"([0-9A-Fa-f]{1,16})(?:;%b(?:=(?:%b|%b))?)*" % (TOKEN, TOKEN, QUOTED)
)
TRAILER_LINE = re.compile(rb"(%b):[\t\x20-\x7e\x80-\xff]*" % TOKEN)
MAX_CHUNK_LINE_BYTES = 256
MAX_TRAILER_BYTES = 8 * 1024
# Size lines, extensions and line ends of one body.  Without a limit, one-byte chunks would cost
# the server far more than the sender (CVE-2023-39326).
MAX_OVERHEAD_BYTES = 64 * 1024
FORBIDDEN_TRAILERS = frozenset(
    (b"content-length", b"transfer-encoding", b"host", b"authorization", b"content-type")
)


class BodyReader(Protocol):
    """Removes the body's bytes from the front of a buffer."""

    is_complete: bool

    def read(self, buffer: bytearray) -> bytes:
        """Returns the body bytes in the buffer, decoded, and removes them; may be empty.

        Raises ApiError 400 for bad framing and 413 for a body over the limit.
        """


class LengthBody:
    """A body of known length; 0 for a request without a body."""

    def __init__(self, length: int) -> None:
        self._remaining = length
        self.is_complete = length == 0

    def read(self, buffer: bytearray) -> bytes:
        data = bytes(buffer[: self._remaining])
        del buffer[: len(data)]
        self._remaining -= len(data)
        self.is_complete = self._remaining == 0
        return data


class _ChunkState(Enum):
    SIZE_LINE = 1
    DATA = 2
    DATA_END = 3
    TRAILER_LINE = 4


class ChunkedBody:
    """A chunked body of at most limit_bytes in total; trailers are checked and dropped."""

    def __init__(self, limit_bytes: int) -> None:
        self.is_complete = False
        self._limit_bytes = limit_bytes
        self._size = 0
        self._overhead = 0
        self._state = _ChunkState.SIZE_LINE
        self._chunk_remaining = 0
        self._trailer_bytes = 0

    def read(self, buffer: bytearray) -> bytes:
        pieces: list[bytes] = []
        position = 0
        while not self.is_complete:
            if self._state is _ChunkState.DATA:
                piece = bytes(buffer[position : position + self._chunk_remaining])
                if not piece:
                    break
                pieces.append(piece)
                position += len(piece)
                self._chunk_remaining -= len(piece)
                if self._chunk_remaining == 0:
                    self._state = _ChunkState.DATA_END
            else:
                end = self._line_end(buffer, position)
                if end < 0:
                    break
                self._take_line(bytes(buffer[position:end]))
                position = end + 2
        del buffer[:position]
        return b"".join(pieces)

    def _line_end(self, buffer: bytearray, position: int) -> int:
        """Returns where the line at position ends, or -1 while it is incomplete."""
        limit = MAX_CHUNK_LINE_BYTES
        if self._state is _ChunkState.DATA_END:
            limit = 0
        elif self._state is _ChunkState.TRAILER_LINE:
            limit = MAX_TRAILER_BYTES
        end = buffer.find(b"\r\n", position, position + limit + 2)
        unfinished = buffer[position : position + limit + 2]
        if end < 0 and (len(unfinished) > limit + 1 or b"\n" in unfinished):
            raise _malformed()
        return end

    def _take_line(self, line: bytes) -> None:
        self._overhead += len(line) + 2
        if self._overhead > MAX_OVERHEAD_BYTES:
            raise ApiError(400, "The chunked body has too much framing for its data.")
        if self._state is _ChunkState.SIZE_LINE:
            match = CHUNK_LINE.fullmatch(line)
            if not match:
                raise _malformed()
            self._start_chunk(int(match[1], 16))
        elif self._state is _ChunkState.DATA_END:
            self._state = _ChunkState.SIZE_LINE
        else:
            self._take_trailer(line)

    def _start_chunk(self, size: int) -> None:
        self._size += size
        if self._size > self._limit_bytes:
            raise body_too_large(self._limit_bytes)
        self._chunk_remaining = size
        self._state = _ChunkState.DATA if size else _ChunkState.TRAILER_LINE

    def _take_trailer(self, line: bytes) -> None:
        if not line:
            self.is_complete = True
            return
        self._trailer_bytes += len(line) + 2
        match = TRAILER_LINE.fullmatch(line)
        if self._trailer_bytes > MAX_TRAILER_BYTES or not match:
            raise _malformed()
        if match[1].lower() in FORBIDDEN_TRAILERS:
            raise ApiError(400, "A trailer field may not frame, route or authenticate a request.")


def body_too_large(limit_bytes: int) -> ApiError:
    return ApiError(413, f"The request body is larger than the {limit_bytes} bytes allowed.")


def _malformed() -> ApiError:
    return ApiError(400, "The chunked body is malformed.")
