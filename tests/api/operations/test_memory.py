"""What the server process spends on each stream that waits: memory, and time to accept it.

The line is 10,000 streams in 150 MiB, accepted in 10 s; python -m bench.waiting measures that many.
"""

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.support.gguf_writer import write_tiny_llama
from tests.support.server import RunningServer
from tests.support.server import gauges
from tests.support.server import run_server

NUM_FIRST = 50
NUM_STREAMS = 1000
FIELDS = {"model": "tiny", "max_tokens": 16000, "ignore_eos": True, "stream": True}


def request_bytes(path: str, fields: dict[str, Any]) -> bytes:
    body = json.dumps({**FIELDS, **fields}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return b"%bContent-Length: %d\r\n\r\n%b" % (head.encode(), len(body), body)


def resident_bytes(server: RunningServer) -> int:
    status = Path(f"/proc/{server.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


def cpu_s(server: RunningServer) -> float:
    fields = Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime and stime


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks into /proc")
@pytest.mark.parametrize(
    "path, fields",
    [
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ],
)
def test_73_a_waiting_stream_takes_at_most_15_kib_and_1_ms(
    path: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    model = write_tiny_llama(tmp_path / "tiny.gguf", context_length=16384)
    options = ("--max-num-sequence", "1", "--max-queue", str(NUM_STREAMS + NUM_FIRST))
    options += ("--context-window-size", "16384", "--drain-timeout-s", "0")
    with run_server("--model", str(model), *options) as server:
        address = server.url.removeprefix("http://").split(":")
        sockets = []
        for number in range(NUM_STREAMS + NUM_FIRST):
            if number == NUM_FIRST:  # what only the first requests take does not count
                assert gauges(server)
                bytes_before, cpu_before_s = resident_bytes(server), cpu_s(server)
            sockets.append(socket.create_connection((address[0], int(address[1]))))
            sockets[-1].sendall(request_bytes(path, fields))
        while gauges(server)["vllm:num_requests_waiting"] < NUM_STREAMS:
            pass  # each look takes a few milliseconds, and those count
        assert (cpu_s(server) - cpu_before_s) / NUM_STREAMS <= 0.001
        for sock in sockets[1:]:  # the 200s come although the requests wait
            sock.settimeout(30)
            assert sock.recv(12) == b"HTTP/1.1 200"
        assert (resident_bytes(server) - bytes_before) / NUM_STREAMS <= 15 * 1024
        for sock in sockets:
            sock.close()
