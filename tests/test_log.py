"""Log lines are escaped, and output never blocks."""

import io
import logging
import os
import time
from typing import Any

from llmsrv import log
from tests.support.pipes import PIPE_BYTES
from tests.support.pipes import fill


def formatted(message: str, *args: object, exc_info: Any = None) -> str:
    record = logging.LogRecord("llmsrv", logging.INFO, "", 0, message, args, exc_info)
    return log._EscapingFormatter("%(message)s").format(record)


def test_text_from_a_client_can_neither_break_lines_nor_colour_them() -> None:
    assert formatted("path %s", "a\r\nb\x1b[31m\x00") == r"path a\r\nb\x1b[31m\x00"


def test_a_traceback_keeps_its_lines_but_its_text_is_escaped() -> None:
    try:
        raise ValueError("red \x1b[31m")
    except ValueError as error:
        text = formatted("failed", exc_info=(type(error), error, error.__traceback__))
    assert text.count("\n") >= 3
    assert "\x1b" not in text


def test_a_blocked_stream_drops_lines_and_reports_how_many() -> None:
    read_fd, write_fd = os.pipe()
    fill(write_fd)
    with open(write_fd, "w") as stream, open(read_fd, "rb") as reader:
        output = log.Output(stream, length=1)
        output.write("taken by the thread, which is blocked now\n")
        while output.num_waiting:
            time.sleep(0.001)
        for number in range(4):
            output.write(f"{number}\n")
        assert output.num_dropped == 3
        reader.read(PIPE_BYTES)
        while output.num_waiting:
            time.sleep(0.001)
        output.write("later\n")
        output.finish()
        stream.close()
        lines = reader.read().decode().splitlines()
    assert lines == ["taken by the thread, which is blocked now", "0", "(3 lines dropped)", "later"]


def test_a_stream_that_stays_blocked_does_not_hold_up_the_end() -> None:
    read_fd, write_fd = os.pipe()
    fill(write_fd)
    with open(write_fd, "w") as stream, open(read_fd, "rb") as reader:
        output = log.Output(stream)
        output.write("x\n")
        started_s = time.monotonic()
        output.finish()
        assert time.monotonic() - started_s < 5 * log.FINISH_S
        reader.read(PIPE_BYTES)  # lets the thread end


def test_a_stream_without_a_file_gets_the_text_too() -> None:
    stream = io.StringIO()
    output = log.Output(stream)
    print("one", "two", file=output)
    output.finish()
    assert stream.getvalue() == "one two\n"


def test_a_closed_reader_is_no_error() -> None:
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    with open(write_fd, "w") as stream:
        output = log.Output(stream)
        output.write("a\n")
        output.write("b\n")
        output.finish()
