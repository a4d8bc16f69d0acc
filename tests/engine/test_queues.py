"""Frames over pipes: complete messages from any fragments, and errors instead of hangs."""

import os
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmsrv.engine.messages import Abort
from llmsrv.engine.messages import Sampling
from llmsrv.engine.messages import Stop
from llmsrv.engine.messages import Submit
from llmsrv.engine.messages import ToEngine
from llmsrv.engine.queues import HEADER
from llmsrv.engine.queues import MAX_FRAME_BYTES
from llmsrv.engine.queues import QueueError
from llmsrv.engine.queues import Receiver
from llmsrv.engine.queues import Sender

GENERATION = 7
SUBMIT = Submit(1, [5, 70_000, 3], 16, [2], Sampling(seed=2**64 - 1, temperature=0.5), n=2)
MESSAGES: list[ToEngine] = [SUBMIT, Abort(1), Abort(2, choice=1), Stop()]


class Pipe:
    """A pipe with a Sender, a Receiver, and both file descriptors."""

    def __init__(self) -> None:
        self.read_fd, self.write_fd = os.pipe()
        self.receiver: Receiver[ToEngine] = Receiver(self.read_fd, GENERATION, ToEngine)
        self.sender = Sender(self.write_fd, GENERATION)

    def close_writer(self) -> None:
        os.close(self.write_fd)
        self.write_fd = -1

    def close(self) -> None:
        for fd in (self.read_fd, self.write_fd):
            if fd >= 0:
                os.close(fd)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


def frame(body: bytes, length: int | None = None, generation: int = GENERATION) -> bytes:
    return HEADER.pack(len(body) if length is None else length, generation) + body


def wire(messages: list[ToEngine]) -> bytes:
    return b"".join(frame(msgspec.msgpack.encode(message)) for message in messages)


def test_messages_arrive_as_they_were_sent(pipe: Pipe) -> None:
    for message in MESSAGES:
        pipe.sender.send(message)
    assert pipe.receiver.receive() == MESSAGES
    assert pipe.receiver.receive() == []


def test_messages_arrive_complete_however_the_bytes_are_split(pipe: Pipe) -> None:
    data = wire(MESSAGES)
    for cut in range(len(data) + 1):
        received = []
        for part in (data[:cut], data[cut:]):
            os.write(pipe.write_fd, part)
            received += pipe.receiver.receive()
        assert received == MESSAGES
    received = []
    for byte in data:
        os.write(pipe.write_fd, bytes([byte]))
        received += pipe.receiver.receive()
    assert received == MESSAGES


@pytest.mark.parametrize("length", [MAX_FRAME_BYTES + 1, 1 << 30, 2**32 - 1])
def test_a_length_beyond_the_limit_is_an_error_before_the_body_arrives(
    pipe: Pipe, length: int
) -> None:
    os.write(pipe.write_fd, frame(b"", length))
    with pytest.raises(QueueError, match=str(length)):
        pipe.receiver.receive()


def test_a_long_length_within_the_limit_allocates_nothing_in_advance(pipe: Pipe) -> None:
    os.write(pipe.write_fd, frame(b"x", MAX_FRAME_BYTES))
    assert pipe.receiver.receive() == []
    assert len(pipe.receiver._buffer) == HEADER.size + 1


def test_a_frame_of_another_generation_is_an_error(pipe: Pipe) -> None:
    body = msgspec.msgpack.encode(Stop())
    os.write(pipe.write_fd, frame(body, generation=GENERATION - 1))
    with pytest.raises(QueueError, match="generation 6"):
        pipe.receiver.receive()


def test_a_reader_sees_the_end_after_all_complete_messages(pipe: Pipe) -> None:
    data = wire(MESSAGES)
    os.write(pipe.write_fd, data + data[:11])
    pipe.close_writer()
    assert pipe.receiver.receive() == MESSAGES
    with pytest.raises(EOFError):
        pipe.receiver.receive()


def test_a_writer_sees_that_its_reader_is_gone(pipe: Pipe) -> None:
    os.close(pipe.read_fd)
    pipe.read_fd = -1
    with pytest.raises(EOFError):
        pipe.sender.send(Stop())


def test_a_writer_never_waits_for_a_stopped_reader_and_counts_unread_bytes(pipe: Pipe) -> None:
    large = Submit(1, list(range(100_000)), 1, [], Sampling(seed=1))
    for _ in range(3):
        pipe.sender.send(large)
    assert pipe.sender.num_waiting_bytes > 500_000
    received: list[ToEngine] = []
    while pipe.sender.num_waiting_bytes:
        received += pipe.receiver.receive()
        pipe.sender.flush()
    received += pipe.receiver.receive()
    assert received == [large] * 3


def test_a_message_beyond_the_limit_is_rejected_and_sends_nothing(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmsrv.engine.queues.MAX_FRAME_BYTES", 1000)
    with pytest.raises(QueueError, match="exceeds 1000"):
        pipe.sender.send(Submit(1, list(range(2000)), 1, [], Sampling(seed=1)))
    pipe.sender.send(Stop())
    assert pipe.receiver.receive() == [Stop()]


def test_one_call_reads_a_bounded_part_of_the_pipe(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmsrv.engine.queues.READ_BYTES", 64)
    monkeypatch.setattr("llmsrv.engine.queues.MAX_READS_PER_CALL", 2)
    for request in range(100):
        pipe.sender.send(Abort(request))
    first = pipe.receiver.receive()
    assert 0 < len(first) < 20
    while len(first) < 100:
        first += pipe.receiver.receive()
    assert first == [Abort(request) for request in range(100)]


def test_neither_end_is_inherited_by_child_programs(pipe: Pipe) -> None:
    os.set_inheritable(pipe.read_fd, True)
    Receiver(pipe.read_fd, GENERATION, ToEngine)
    assert not os.get_inheritable(pipe.read_fd)
    assert not os.get_inheritable(pipe.write_fd)


@given(st.binary(max_size=200))
def test_any_body_is_a_message_or_an_error(body: bytes) -> None:
    pipe = Pipe()
    try:
        os.write(pipe.write_fd, frame(body))
        (message,) = pipe.receiver.receive()
        assert isinstance(message, ToEngine)
    except QueueError:
        pass
    finally:
        pipe.close()


@given(st.binary(max_size=300))
def test_any_bytes_are_messages_or_an_error_or_incomplete(data: bytes) -> None:
    pipe = Pipe()
    try:
        os.write(pipe.write_fd, data)
        pipe.close_writer()
        with pytest.raises((QueueError, EOFError)):
            while pipe.receiver.receive():
                pass
            raise EOFError
    finally:
        pipe.close()


@pytest.mark.parametrize(
    "body",
    [
        b"\xdd\xff\xff\xff\xff",  # an array of 2**32 - 1
        b"\x94\xa6submit\x01\xdd\xff\xff\xff\xff",  # prompt ids announced but missing
        b"\x91" * 100_000,  # nested arrays
        b"\xc6\xff\xff\xff\xff",  # 4 GiB of bytes
        b"",
    ],
)
def test_a_hostile_body_is_an_error_and_no_giant_allocation(pipe: Pipe, body: bytes) -> None:
    pipe.sender._waiting.append(memoryview(frame(body)))
    pipe.sender.flush()
    with pytest.raises(QueueError):
        while True:
            pipe.receiver.receive()
            pipe.sender.flush()
