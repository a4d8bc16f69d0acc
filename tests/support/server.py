"""A real server in its own process, started as a user would, for tests that use HTTP."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
READY = re.compile(r"(?:ready at|Uvicorn running on) (http://\S+)")


class RunningServer:
    """url: where it answers; pid: of the server process; output: what it has printed so far."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.pid = process.pid
        self.output = ""
        self.url = ""
        self._ready = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Returns after the ready line; fails with the output if the server ends first."""
        assert self._ready.wait(timeout_s), f"not ready after {timeout_s} s:\n{self.output}"
        assert self.url, f"the server ended with {self.process.wait()}:\n{self.output}"

    def engine_pid(self) -> int:
        """The engine process: the server's child that runs multiprocessing's spawn."""
        for child in child_pids(self.pid):
            command = Path(f"/proc/{child}/cmdline").read_bytes()
            if b"spawn_main" in command:
                return child
        raise AssertionError(f"no engine process:\n{self.output}")

    def stop(self, signal_number: int = signal.SIGTERM) -> int:
        """Signals the server and returns its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal_number)
        return self.process.wait(40)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line
            if match := READY.search(line):
                self.url = match[1]
                self._ready.set()
        self._ready.set()


def child_pids(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in children.split()]


@contextmanager
def run_server(
    *options: str,
    command: Sequence[str] = (sys.executable, "llmsrv.py"),
    cwd: Path = ROOT,
    environment: dict[str, str] | None = None,
    wait: bool = True,
) -> Iterator[RunningServer]:
    """Runs `command` on a free port of 127.0.0.1 during the block."""
    process = subprocess.Popen(
        [*command, "--port", "0", *options],
        cwd=cwd,
        env=os.environ | (environment or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    server = RunningServer(process)
    try:
        if wait:
            server.wait_ready()
        yield server
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def gauges(server: RunningServer, key: str | None = None) -> dict[str, float]:
    """The values of /metrics by metric name, without labels."""
    request = urllib.request.Request(f"{server.url}/metrics")
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    with urllib.request.urlopen(request, timeout=10) as response:
        text = response.read().decode()
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {name.partition("{")[0]: float(value) for name, value in lines}


def is_idle(server: RunningServer, key: str | None = None) -> bool:
    """Whether no request runs or waits and no KV block is in use."""
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    values = gauges(server, key)
    return all(values[f"vllm:{name}"] == 0 for name in names)


def eventually(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Returns once the condition holds; fails if it does not hold in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.01)
