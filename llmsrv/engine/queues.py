"""The queue between the server process and the engine process: framed messages over two pipes.

A frame is its body's length (4 bytes), the engine's generation (4 bytes), both little-endian, and
the body in msgpack.  The pipes are made anew for each engine start, and both ends are non-blocking
with buffers of their own, so neither process ever blocks in a write or on half a message.
(multiprocessing.Queue pickles, may block its caller, and has a lock that a killed process keeps.)

What cannot be a frame of ours is a QueueError, upon which the engine is ended and started again.
Knows neither the event loop of the server nor that of the engine: each calls when it may go on.
"""

import os
import struct
from collections import deque
from typing import Any
from typing import Generic
from typing import TypeVar

import msgspec

HEADER = struct.Struct("<II")  # length of the body, generation
# A prompt of 8 M ids takes 40 MB; a longer frame is garbage.
MAX_FRAME_BYTES = 64 << 20
READ_BYTES = 1 << 16  # a pipe's capacity on Linux
# One call takes no more than this, so that one reader cannot keep the server's loop for itself.
MAX_READS_PER_CALL = 16

T = TypeVar("T")


class QueueError(Exception):
    """The other end sent what is no frame of ours, or was asked to take one that is too long."""


class Sender:
    """The writing end.  What the pipe does not take at once waits here, without a bound: the owner
    looks at num_waiting_bytes before it makes more."""

    def __init__(self, fd: int, generation: int) -> None:
        _prepare(fd)
        self._fd = fd
        self._generation = generation
        self._encoder = msgspec.msgpack.Encoder()
        self._waiting: deque[memoryview] = deque()
        self.num_waiting_bytes = 0

    def send(self, message: msgspec.Struct) -> None:
        """Writes the message, or what the pipe takes of it; flush() goes on with the rest.

        Raises QueueError, and sends nothing, when the message is too long; EOFError when the
        reader is gone.
        """
        frame = bytearray(HEADER.size)
        self._encoder.encode_into(message, frame, HEADER.size)
        length = len(frame) - HEADER.size
        if length > MAX_FRAME_BYTES:
            raise QueueError(f"a message of {length} bytes exceeds {MAX_FRAME_BYTES}")
        HEADER.pack_into(frame, 0, length, self._generation)
        self._waiting.append(memoryview(frame))
        self.num_waiting_bytes += len(frame)
        self.flush()

    def flush(self) -> None:
        """Writes what the pipe takes now.  Raises EOFError when the reader is gone."""
        while self._waiting:
            frame = self._waiting[0]
            try:
                written = os.write(self._fd, frame)
            except BlockingIOError:
                return
            except BrokenPipeError:
                raise EOFError("the reading end is closed") from None
            self.num_waiting_bytes -= written
            if written == len(frame):
                self._waiting.popleft()
            else:
                self._waiting[0] = frame[written:]


class Receiver(Generic[T]):
    """The reading end, for messages of one type or union of types."""

    def __init__(self, fd: int, generation: int, type: Any) -> None:
        _prepare(fd)
        self._fd = fd
        self._generation = generation
        self._decoder = msgspec.msgpack.Decoder(type)
        self._buffer = bytearray()

    def receive(self) -> list[T]:
        """Every message that is there as a whole; never waits.

        Raises QueueError on what is no frame, and EOFError when the writer is gone and everything
        that it sent as a whole has been returned.
        """
        is_open = self._fill()
        messages = self._take_messages()
        if not is_open and not messages:
            raise EOFError("the writing end is closed")
        return messages

    def _fill(self) -> bool:
        """Reads what is there; False at the end of the file."""
        for _ in range(MAX_READS_PER_CALL):
            try:
                data = os.read(self._fd, READ_BYTES)
            except BlockingIOError:
                return True
            if not data:
                return False
            self._buffer += data
            if len(data) < READ_BYTES:
                return True
        return True

    def _take_messages(self) -> list[T]:
        messages: list[T] = []
        start, buffer = 0, self._buffer
        while len(buffer) - start >= HEADER.size:
            length, generation = HEADER.unpack_from(buffer, start)
            # Before waiting for the body: what is no header must not make anybody wait for it.
            if length > MAX_FRAME_BYTES or generation != self._generation:
                raise QueueError(
                    f"not a frame: length {length}, generation {generation}; expected at most "
                    f"{MAX_FRAME_BYTES} and generation {self._generation}"
                )
            body = start + HEADER.size
            if len(buffer) < body + length:
                break
            start = body + length
            messages.append(self._decode(buffer[body:start]))
        del buffer[:start]
        return messages

    def _decode(self, body: bytearray) -> T:
        try:
            message: T = self._decoder.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise QueueError(f"a frame that is no message: {error}") from None
        return message


def _prepare(fd: int) -> None:
    os.set_blocking(fd, False)
    os.set_inheritable(fd, False)  # compilers and other programs we start must not hold a pipe open
