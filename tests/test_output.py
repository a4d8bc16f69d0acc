"""A server whose output nobody reads: it serves, and signals end it."""

import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.gguf_writer import write_tiny_llama
from tests.support.pipes import PIPE_BYTES
from tests.support.pipes import fill
from tests.support.sdk import openai_client
from tests.support.server import ROOT
from tests.support.server import eventually


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def unread_server(model: Path, stream: str) -> Iterator["tuple[subprocess.Popen[bytes], str, int]"]:
    """A server with a full pipe as `stream`, its URL, and the reading end of the pipe."""
    port = free_port()
    read_fd, write_fd = os.pipe()
    fill(write_fd)
    command = [sys.executable, "llmsrv.py", "--model", str(model), "--port", str(port)]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, stream: write_fd}
    process = subprocess.Popen(command, cwd=ROOT, **streams)  # type: ignore[call-overload]
    os.close(write_fd)
    try:
        yield process, f"http://127.0.0.1:{port}", read_fd
    finally:
        process.kill()
        process.wait()
        os.close(read_fd)


def is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_124_a_server_whose_output_nobody_reads_answers_and_obeys_sigterm(
    stream: str, tmp_path: Path
) -> None:
    model = write_tiny_llama(tmp_path / "tiny.gguf")
    with unread_server(model, stream) as (process, url, _):
        eventually(lambda: is_healthy(url), 60)
        for _ in range(10):  # each is an error that is logged
            with pytest.raises(urllib.error.HTTPError):
                urllib.request.urlopen(f"{url}/none", timeout=5)
        client = openai_client(url)
        assert client.completions.create(model="tiny", prompt="a", max_tokens=2).usage
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def test_the_ready_message_arrives_once_someone_reads(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "tiny.gguf")
    with unread_server(model, "stdout") as (process, url, read_fd):
        eventually(lambda: is_healthy(url), 60)
        text = b""
        while not text.strip(b"\0").endswith(b"\n"):
            text += os.read(read_fd, PIPE_BYTES)
        assert b"is ready at" in text
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def test_a_startup_error_does_not_wait_for_a_reader(tmp_path: Path) -> None:
    with unread_server(tmp_path / "none.gguf", "stderr") as (process, _, _read_fd):
        assert process.wait(20) == 1
