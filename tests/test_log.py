"""Log lines are escaped and never block."""

import logging
import queue
from typing import Any

from llmsrv import log


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


def test_a_blocked_sink_drops_lines_and_reports_how_many() -> None:
    records: queue.Queue[logging.LogRecord] = queue.Queue(1)
    handler = log._DroppingHandler(records)
    for number in range(4):
        handler.handle(logging.LogRecord("llmsrv", logging.INFO, "", 0, f"{number}", (), None))
    assert records.get_nowait().getMessage() == "0"
    handler.handle(logging.LogRecord("llmsrv", logging.INFO, "", 0, "later", (), None))
    assert records.get_nowait().getMessage() == "later (3 lines dropped before this one)"
