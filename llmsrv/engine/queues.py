"""The queue between the server process and the engine process: framed messages over two pipes.

A frame is the length of its body (4 bytes), the engine's generation (4 bytes), both little-endian,
and the body in msgpack.  Each engine start makes new pipes.  Both ends are non-blocking and have
their own buffers, so neither process ever blocks in a write or on half a message.
(multiprocessing.Queue pickles, may block its caller, and has a lock that a killed process keeps.)

Anything that is not a valid frame raises QueueError; then the engine is killed and restarted.
Knows nothing of event loops: the owners call when a pipe may be ready.
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
# A limit per call, so that one engine cannot monopolize the server's event loop.
MAX_READS_PER_CALL = 16

T = TypeVar("T")


class QueueError(Exception):
    """The other end sent an invalid frame, or a message to send is too long."""


class Sender:
    """The writing end.

    Bytes that do not fit into the pipe wait here, without a limit.  The owner checks
    num_waiting_bytes before it sends more.
    """

    def __init__(self, fd: int, generation: int) -> None:
        _prepare(fd)
        self._fd = fd
        self._generation = generation
        self._encoder = msgspec.msgpack.Encoder()
        self._waiting: deque[memoryview] = deque()
        self.num_waiting_bytes = 0

    def send(self, message: msgspec.Struct) -> None:
        """Writes as much of the message as the pipe takes; flush() continues with the rest.

        Raises QueueError, and sends nothing, if the message is too long.  Raises EOFError if the
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
        """Writes as much as the pipe takes now.  Raises EOFError if the reader is gone."""
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
    """The reading end, for messages of one type or a union of types."""

    def __init__(self, fd: int, generation: int, type: Any) -> None:
        _prepare(fd)
        self._fd = fd
        self._generation = generation
        self._decoder = msgspec.msgpack.Decoder(type)
        self._buffer = bytearray()

    def receive(self) -> list[T]:
        """All complete messages that have arrived; never waits.

        Raises QueueError on an invalid frame.  Raises EOFError if the writer is gone and all
        complete messages have been returned.
        """
        is_open = self._fill()
        messages = self._take_messages()
        if not is_open and not messages:
            raise EOFError("the writing end is closed")
        return messages

    def _fill(self) -> bool:
        """Reads what has arrived; False at the end of the file."""
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
            # Check before the body arrives: an invalid header must not make the reader wait for it.
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
            raise QueueError(f"a frame is not a message: {error}") from None
        return message


def _prepare(fd: int) -> None:
    os.set_blocking(fd, False)
    os.set_inheritable(fd, False)  # programs we start, such as compilers, must not hold it open
