"""Pipes that nobody reads."""

import os

PIPE_BYTES = 65536  # the capacity on Linux


def fill(write_fd: int) -> None:
    """Fills a pipe, so that the next write to it blocks."""
    os.set_blocking(write_fd, False)
    assert sum(os.write(write_fd, bytes(4096)) for _ in range(PIPE_BYTES // 4096)) == PIPE_BYTES
    os.set_blocking(write_fd, True)
