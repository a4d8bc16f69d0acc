"""CPU time of a GET /health and of a streamed chunk, in llmsrv's server and in uvicorn with h11.

python -m bench.http_cpu [--requests N] [--rounds N]        (needs uvicorn)

Each server runs in its own process and reports its CPU time.  The client is one keep-alive
connection.  The servers take turns within each round, so that a busy minute slows them all.
"""

import argparse
import asyncio
import json
import multiprocessing
import socket
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from bench.machine import describe

EVENT = b"data: " + json.dumps({"id": "chatcmpl-1", "choices": [{"delta": "x" * 200}]}).encode()
SERVERS = ("llmsrv uvloop", "llmsrv asyncio", "uvicorn uvloop", "uvicorn asyncio")
FIELDS = (
    b"Host: 127.0.0.1\r\nAccept: application/json\r\nAccept-Encoding: gzip, deflate\r\n"
    b"Connection: keep-alive\r\nContent-Type: application/json\r\nUser-Agent: bench\r\n\r\n"
)


async def app(scope: Any, receive: Any, send: Any) -> None:
    """/health, /cpu (seconds so far), /stream?N (N chunks, one for each turn of the event loop)."""
    if scope["path"] == "/stream":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(int(scope["query_string"])):
            await send({"type": "http.response.body", "body": EVENT, "more_body": True})
            await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b""})
        return
    body = b'{"status":"ok"}' if scope["path"] == "/health" else b"{%.6f}" % time.process_time()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def serve(name: str, port_sender: Any) -> None:
    """Runs one of SERVERS in this process, on a free port that it sends first."""
    from llmsrv.server.listener import bind

    server, loop = name.split()
    sockets = bind("127.0.0.1", 0)
    port_sender.send(sockets[0].getsockname()[1])
    if server == "uvicorn":
        import uvicorn

        options: dict[str, Any] = {"http": "h11", "loop": loop, "lifespan": "off"}
        config = uvicorn.Config(app, access_log=False, log_level="warning", **options)
        uvicorn.Server(config).run(sockets)
    else:
        from llmsrv.server.server import run

        (run if loop == "uvloop" else asyncio.run)(serve_llmsrv(sockets))


async def serve_llmsrv(sockets: list[socket.socket]) -> None:
    from llmsrv.server.server import Server
    from llmsrv.server.settings import ServerSettings

    await Server(app, sockets, ServerSettings()).start()
    await asyncio.Event().wait()


class Client:
    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))

    def get(self, target: bytes, end: bytes = b"}") -> bytes:
        """Reads until the response ends with `end`; returns its last bytes."""
        self._socket.sendall(b"GET %b HTTP/1.1\r\n%b" % (target, FIELDS))
        data = self._socket.recv(262144)
        while not data.endswith(end):
            data = data[-len(end) :] + self._socket.recv(262144)
        return data

    def server_cpu_s(self) -> float:
        return float(self.get(b"/cpu").rpartition(b"{")[2][:-1])


def server_cpu_us(client: Client, send: Callable[[], object], num_items: int) -> float:
    """The server's CPU time for `send`, per item, in microseconds."""
    before_s = client.server_cpu_s()
    send()
    return (client.server_cpu_s() - before_s) / num_items * 1e6


def measure(client: Client, requests: int) -> tuple[float, float]:
    """Microseconds of CPU time for a GET /health, and for a chunk."""
    chunks = requests * 5
    stream = b"/stream?%d" % chunks
    return (
        server_cpu_us(client, lambda: [client.get(b"/health") for _ in range(requests)], requests),
        server_cpu_us(client, lambda: client.get(stream, b"0\r\n\r\n"), chunks),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()

    context = multiprocessing.get_context("spawn")
    clients, processes = {}, []
    for name in SERVERS:
        receiver, sender = context.Pipe(duplex=False)
        processes.append(context.Process(target=serve, args=(name, sender), daemon=True))
        processes[-1].start()
        clients[name] = Client(receiver.recv())

    print(describe())
    versions = ", ".join(f"{name} {version(name)}" for name in ("uvicorn", "h11", "uvloop"))
    print(f"{versions}; medians of {options.rounds} rounds")
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in SERVERS}
    for _ in range(options.rounds):
        for name, client in clients.items():
            times[name].append(measure(client, options.requests))
    print(f"{'server':18} {'GET /health, us':>16} {'chunk, us':>10}")
    for name, rounds in times.items():
        health, chunk = (statistics.median(column) for column in zip(*rounds))
        print(f"{name:18} {health:16.1f} {chunk:10.2f}")
    for process in processes:
        process.kill()


if __name__ == "__main__":
    main()
