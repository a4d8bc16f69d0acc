"""What the server process holds for each stream that waits for its turn."""

import socket
from pathlib import Path

import pytest

from tests.support.gguf_writer import write_tiny_llama
from tests.support.server import RunningServer
from tests.support.server import gauges
from tests.support.server import run_server

NUM_STREAMS = 1000
BODY = b'{"model": "tiny", "prompt": "a", "max_tokens": 16000, "ignore_eos": true, "stream": true}'
REQUEST = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
)


def resident_bytes(server: RunningServer) -> int:
    status = Path(f"/proc/{server.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks into /proc")
def test_73_a_waiting_stream_takes_at_most_15_kib(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf", context_length=16384)
    options = ("--max-num-sequence", "1", "--max-queue", str(NUM_STREAMS))
    options += ("--context-window-size", "16384", "--drain-timeout-s", "0")
    with run_server("--model", str(path), *options) as server:
        address = server.url.removeprefix("http://").split(":")
        before = resident_bytes(server)
        sockets = []
        for _ in range(NUM_STREAMS):
            sockets.append(socket.create_connection((address[0], int(address[1]))))
            sockets[-1].sendall(REQUEST)
        for sock in sockets[1:]:  # the 200s come although the requests wait
            sock.settimeout(30)
            assert sock.recv(12) == b"HTTP/1.1 200"
        assert gauges(server)["vllm:num_requests_waiting"] > 0.9 * NUM_STREAMS
        assert (resident_bytes(server) - before) / NUM_STREAMS <= 15 * 1024
        for sock in sockets:
            sock.close()
