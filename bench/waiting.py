"""How fast streams are accepted that have to wait, and how much memory the server holds for them.

python -m bench.waiting [--streams N] [-- SERVER OPTIONS]

The server runs one request at a time.  The client opens N connections, sends the same short request
on each, and reads nothing until all of them wait: "accepted".  Memory is the server process's
(resident, over what it was before), when the head of each stream has arrived.
"""

import argparse
import json
import os
import socket
import time
import urllib.request
from pathlib import Path

from bench.machine import describe
from bench.servers import first_model
from tests.support.server import RunningServer
from tests.support.server import run_server

BODIES = {
    "/v1/completions": {"prompt": "Once upon a time"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Tell me a long story!"}]},
}
LIMITS = {"max_tokens": 4000, "ignore_eos": True, "stream": True}  # longer than a measurement
LARGEST_QUEUE_TOKENS = "100000000"
ACCEPT_TIMEOUT_S = 120.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--streams", type=int, default=10_000)
    parser.add_argument("server", nargs="*", help="options of the server, after --")
    options = parser.parse_args()
    queue = ("--max-queue", str(options.streams), "--max-queue-tokens", LARGEST_QUEUE_TOKENS)
    alone = ("--max-num-sequence", "1", "--drain-timeout-s", "0")
    print(describe())
    print(f"{options.streams} streams       accepted, s   server's CPU, s   MiB   KiB a stream")
    for path, fields in BODIES.items():
        with run_server(*queue, *alone, *options.server) as server:
            accepted_s, cpu_s, used_bytes = measure(server, path, fields, options.streams)
        print(
            f"{path:22}{accepted_s:12.1f}{cpu_s:18.1f}{used_bytes / 2**20:6.0f}"
            f"{used_bytes / options.streams / 1024:15.1f}"
        )


def measure(
    server: RunningServer, path: str, fields: dict[str, object], num_streams: int
) -> tuple[float, float, int]:
    """Seconds until all streams wait, the server's CPU time for it, and the bytes they take."""
    host, port = server.url.removeprefix("http://").split(":")
    request = request_bytes(path, {"model": first_model(server.url), **fields, **LIMITS})
    before, cpu_before_s = resident_bytes(server.pid), cpu_s(server.pid)
    begun_s = time.monotonic()
    sockets = []
    for _ in range(num_streams):
        sockets.append(socket.create_connection((host, int(port))))
        sockets[-1].sendall(request)
    while num_waiting(server) < num_streams - 1:
        assert time.monotonic() - begun_s < ACCEPT_TIMEOUT_S, "not all were accepted"
        time.sleep(0.05)
    accepted_s, used_s = time.monotonic() - begun_s, cpu_s(server.pid) - cpu_before_s
    for sock in sockets:
        sock.settimeout(ACCEPT_TIMEOUT_S)
        assert sock.recv(12) == b"HTTP/1.1 200"
    used_bytes = resident_bytes(server.pid) - before
    for sock in sockets:
        sock.close()
    return accepted_s, used_s, used_bytes


def request_bytes(path: str, fields: dict[str, object]) -> bytes:
    body = json.dumps(fields).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return b"%bContent-Length: %d\r\n\r\n%b" % (head.encode(), len(body), body)


def num_waiting(server: RunningServer) -> int:
    """As the engine reported it after its last step."""
    with urllib.request.urlopen(f"{server.url}/metrics") as response:
        lines = response.read().decode().splitlines()
    values = (line.split()[-1] for line in lines if line.startswith("vllm:num_requests_waiting"))
    return int(sum(map(float, values)))


def resident_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime and stime


if __name__ == "__main__":
    main()
