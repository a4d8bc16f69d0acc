"""Shows the progress of a download."""

from typing import TextIO

MEGABYTE = 1_000_000


class Progress:
    """On a terminal, a bar that is redrawn in place; otherwise a line every 10 %."""

    def __init__(self, stream: TextIO, what: str, total_bytes: int) -> None:
        self._stream = stream
        self._what = what
        self._total_bytes = max(total_bytes, 1)
        self._is_terminal = stream.isatty()
        self._percent_shown = 0
        self._size = f"{round(total_bytes / MEGABYTE)} MB"
        try_write(stream, self._bar(0) if self._is_terminal else f"{what} ({self._size}, once)\n")

    def show(self, done_bytes: int) -> None:
        percent = min(100, done_bytes * 100 // self._total_bytes)
        step = 1 if self._is_terminal else 10
        if percent // step > self._percent_shown // step:
            self._percent_shown = percent
            line = f"{self._what}: {percent // step * step} %\n"
            try_write(self._stream, self._bar(percent) if self._is_terminal else line)

    def end(self) -> None:
        if self._is_terminal:
            try_write(self._stream, "\n")

    def _bar(self, percent: int) -> str:
        filled = percent * 30 // 100
        bar = "#" * filled + "." * (30 - filled)
        return f"\r{self._what} [{bar}] {percent:3d} % of {self._size}"


def try_write(stream: TextIO, text: str) -> None:
    try:
        stream.write(text)
        stream.flush()
    except (OSError, ValueError):  # the reader is gone, but the download should continue
        pass
