"""Starts the servers that benchmarks measure, and stops them at the end."""

import contextlib
import json
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
START_S = 600.0  # a large model is read from disk, and its kernels are compiled
STOP_S = 30.0
POLL_S = 0.2


@contextlib.contextmanager
def run_llmsrv(options: list[str]) -> Iterator[str]:
    """Starts llmsrv on a free port; yields its URL."""
    process = subprocess.Popen(
        [sys.executable, "llmsrv.py", "--port", "0", *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        print(line := process.stdout.readline().strip())
        yield line.partition("ready at ")[2].partition(" ")[0]
    finally:
        stop(process)


@contextlib.contextmanager
def run_command(command: str) -> Iterator[str]:
    """Starts any server from a command line; yields its URL once it is ready.

    command  split as a shell would, but not run by one; {port} becomes a free port
    Raises SystemExit, with the end of the server's output, if it exits or is not ready in time.
    """
    port = free_port()
    arguments = [argument.replace("{port}", str(port)) for argument in shlex.split(command)]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(arguments, stdout=output, stderr=subprocess.STDOUT)
        try:
            deadline_s = time.monotonic() + START_S
            while not is_ready(url):
                if process.poll() is not None or time.monotonic() > deadline_s:
                    output.seek(0)
                    end = output.read()[-2000:].decode(errors="replace")
                    raise SystemExit(f"{command}: the server did not start\n{end}")
                time.sleep(POLL_S)
            yield url
        finally:
            stop(process)


def stop(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def is_ready(url: str) -> bool:
    """By /health, or by /v1/models if the server has no /health.

    In this order: llama.cpp's server lists its models before it can answer requests.
    """
    status = get_status(f"{url}/health")
    return (get_status(f"{url}/v1/models") if status == 404 else status) == 200


def get_status(url: str) -> int:
    """The status of the response, or 0 if the server cannot be reached."""
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            status: int = response.status
            return status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def first_model(url: str) -> str:
    """The id of the first model that the server lists."""
    with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as response:
        name: str = json.load(response)["data"][0]["id"]
        return name
