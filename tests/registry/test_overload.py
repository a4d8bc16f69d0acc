"""Which requests a full queue refuses."""

import http.client
import os
import signal
from pathlib import Path
from typing import Any
from typing import cast

import pytest

from llmsrv.config import Config
from llmsrv.engine.client import EngineClient
from llmsrv.engine.client import Queued
from llmsrv.errors import ApiError
from llmsrv.registry.counters import Counters
from llmsrv.registry.service import Service
from llmsrv.registry.service import TextModel
from tests.support.gguf_writer import write_tiny_llama
from tests.support.server import RunningServer
from tests.support.server import eventually
from tests.support.server import gauges
from tests.support.server import run_server


class Engine:
    def __init__(self, queued: dict[bytes, Queued], num_free_seats: int) -> None:
        self.queued = lambda: queued
        self.num_free_seats = num_free_seats


def error_of(
    queued: dict[bytes, Any], tenant: bytes, num_free_seats: int = 0
) -> ApiError | None:
    counts = {name: Queued(*numbers) for name, numbers in queued.items()}
    return Service(
        Config(max_queue=10, max_queue_tokens=1000),
        ["tiny"],
        cast(EngineClient, Engine(counts, num_free_seats)),
        cast(TextModel, None),
        Counters(),
    ).overloaded(tenant)


@pytest.mark.parametrize(
    "queued, tenant, status",
    [
        ({}, b"", None),
        ({b"": (9, 999)}, b"", None),
        ({b"": (10, 0)}, b"", 503),
        ({b"": (1, 1000)}, b"", 503),
        ({b"a": (10, 0)}, b"a", 503),  # alone
        ({b"a": (10, 0)}, b"b", None),  # its share stays reserved
        ({b"a": (10, 0), b"b": (4, 0)}, b"b", None),
        ({b"a": (10, 0), b"b": (5, 0)}, b"b", 429),
        ({b"a": (10, 0), b"b": (1, 0)}, b"a", 429),
        ({b"a": (2, 900), b"b": (1, 100)}, b"a", 429),
        ({b"a": (2, 900), b"b": (1, 100)}, b"b", None),
        ({b"a": (5, 0), b"b": (4, 0)}, b"a", None),
    ],
)
def test_a_full_queue_refuses_the_tenants_that_fill_it(
    queued: dict[bytes, Any], tenant: bytes, status: int | None
) -> None:
    error = error_of(queued, tenant)
    assert (error and error.status) == status
    if error:
        assert error.headers["Retry-After"] == "1"
        codes = {503: "server_is_overloaded", 429: "rate_limit_exceeded"}
        assert error.code == codes[error.status]


@pytest.mark.parametrize("num_queued, is_refused", [(10, False), (13, False), (14, True)])
def test_requests_that_free_seats_will_take_do_not_fill_the_queue(
    num_queued: int, is_refused: bool
) -> None:
    assert (error_of({b"": (num_queued, 0)}, b"", num_free_seats=4) is not None) is is_refused


def test_a_burst_that_fits_seats_and_queue_is_served_whole(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "tiny.gguf")
    with run_server("--model", str(model), "--max-queue", "32") as server:
        body = b'{"model": "tiny", "prompt": "a", "max_tokens": 1}'
        engine = server.engine_pid()
        os.kill(engine, signal.SIGSTOP)  # so that no request is admitted before all have arrived
        connections = [start_request(server, body) for _ in range(32 + 32)]
        eventually(lambda: gauges(server)["llmsrv:http_open_connections"] == 32 + 32 + 1)
        refused = start_request(server, body).getresponse()
        assert (refused.status, refused.headers["Retry-After"]) == (503, "1")
        assert gauges(server)["vllm:admission_rejections_total"] == 1
        os.kill(engine, signal.SIGCONT)
        assert {connection.getresponse().status for connection in connections} == {200}


def start_request(server: RunningServer, body: bytes) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=20)
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    return connection
