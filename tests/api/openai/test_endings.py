"""Every request ends exactly once, whether its client leaves, stalls, or the engine dies."""

import http.client
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.gguf_writer import write_tiny_llama
from tests.support.sdk import openai_client
from tests.support.server import RunningServer
from tests.support.server import eventually
from tests.support.server import gauges
from tests.support.server import is_idle
from tests.support.server import run_server
from tests.support.servers import KEY

MODEL = "SmolLM2-135M-Instruct"


def connect(server: RunningServer) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def post(path: str, body: dict[str, Any], key: str = "none") -> bytes:
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {key}\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


@pytest.fixture(scope="module")
def endless_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose context is too long for an answer to fill it during a test."""
    path = tmp_path_factory.mktemp("endless") / "tiny.gguf"
    return write_tiny_llama(path, context_length=65536)


def completion(**fields: Any) -> bytes:
    """A request that would run for a long time on the real model."""
    body = {"model": MODEL, "prompt": "Once", "max_tokens": 4000, "ignore_eos": True} | fields
    return post("/v1/completions", body)


def running(server: RunningServer) -> float:
    return gauges(server)["vllm:num_requests_running"]


@pytest.mark.parametrize(
    ("stream", "reset"),
    [
        pytest.param(True, True, id="streaming, reset"),
        pytest.param(True, False, id="streaming, closed"),
        pytest.param(False, True, id="whole, reset"),
        pytest.param(False, False, id="whole, closed", marks=pytest.mark.slow),  # a second's grace
    ],
)
def test_a_client_that_leaves_during_decode_frees_everything(
    server: RunningServer, stream: bool, reset: bool
) -> None:
    with connect(server) as client:
        client.sendall(completion(stream=stream))
        eventually(lambda: running(server) == 1)
        if reset:
            linger = (1).to_bytes(4, "little") + (0).to_bytes(4, "little")
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    eventually(lambda: is_idle(server))


@pytest.mark.slow
def test_a_client_that_leaves_during_a_long_prefill_frees_everything(server: RunningServer) -> None:
    with connect(server) as client:
        client.sendall(completion(prompt=[504] * 4000, max_tokens=1))
        eventually(lambda: running(server) == 1)
    eventually(lambda: is_idle(server))


@pytest.fixture(scope="module")
def narrow_server(endless_model: Path) -> Iterator[RunningServer]:
    """Runs one request, and lets one wait."""
    with run_server(*narrow(endless_model), "--max-queue", "1") as server:
        yield server


def narrow(model: Path) -> tuple[str, ...]:
    """Options with which one request runs at a time, possibly for long."""
    return "--model", str(model), "--served-model-name", MODEL, "--mode", "interactive"


def endless(**fields: Any) -> bytes:
    return completion(max_tokens=65000, stream=True, **fields)


def waiting(server: RunningServer) -> float:
    return gauges(server)["vllm:num_requests_waiting"]


@pytest.mark.slow
def test_a_client_that_leaves_while_queued_is_never_scheduled(narrow_server: RunningServer) -> None:
    with connect(narrow_server) as first, connect(narrow_server) as second:
        first.sendall(endless())
        eventually(lambda: running(narrow_server) == 1)
        second.sendall(endless())
        eventually(lambda: waiting(narrow_server) == 1)
        second.close()
        eventually(lambda: waiting(narrow_server) == 0)
        assert running(narrow_server) == 1
    eventually(lambda: is_idle(narrow_server))


def test_a_request_that_finds_the_queue_full_may_be_retried(
    narrow_server: RunningServer,
) -> None:
    with connect(narrow_server) as first, connect(narrow_server) as second:
        first.sendall(endless())
        eventually(lambda: running(narrow_server) == 1)
        second.sendall(endless())
        eventually(lambda: waiting(narrow_server) == 1)
        client = openai_client(narrow_server.url)
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model=MODEL, prompt="a")
        assert caught.value.status_code == 503 and caught.value.code == "server_is_overloaded"
        assert caught.value.response.headers["retry-after"] == "1"
        assert running(narrow_server) == 1
    eventually(lambda: is_idle(narrow_server))
    client.completions.create(model=MODEL, prompt="a", max_tokens=1)


@pytest.mark.slow
def test_a_queue_is_also_bounded_in_tokens_and_a_request_in_time(endless_model: Path) -> None:
    limits = ("--max-queue-tokens", "100", "--request-timeout-s", "2")
    with run_server(*narrow(endless_model), *limits) as server:
        client = openai_client(server.url)
        with connect(server) as first, connect(server) as second:
            first.sendall(endless())
            eventually(lambda: running(server) == 1)
            second.sendall(endless(prompt=[5] * 100))
            eventually(lambda: waiting(server) == 1)
            message = "100 tokens of prompts are waiting"
            with pytest.raises(openai.InternalServerError, match=message):
                client.completions.create(model=MODEL, prompt="a")
            while b"request_timeout" not in (data := first.recv(65536)):
                assert data
        eventually(lambda: is_idle(server))


def test_a_reader_that_stops_reading_does_not_stop_the_others(tiny_server: RunningServer) -> None:
    body = {"model": "tiny", "prompt": "a", "max_tokens": 400, "ignore_eos": True, "stream": True}
    stalled = connect(tiny_server)
    stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    stalled.sendall(post("/v1/completions", body | {"n": 16, "logprobs": 5}, KEY))
    client = openai_client(tiny_server.url, KEY)
    for _ in range(3):
        text = client.completions.create(model="tiny", prompt="b", max_tokens=50)
        assert text.usage is not None and text.usage.completion_tokens > 0
    stalled.close()
    eventually(lambda: is_idle(tiny_server, KEY))


def health(server: RunningServer) -> tuple[int, dict[str, Any]]:
    host, port = server.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    connection.request("GET", "/health")
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def accepts(server: RunningServer) -> bool:
    try:
        connect(server).close()
    except ConnectionRefusedError:
        return False
    return True


@pytest.mark.parametrize(
    "stream",
    [pytest.param(True, id="streaming"), pytest.param(False, id="whole", marks=pytest.mark.slow)],
)
def test_a_killed_engine_ends_its_requests_within_a_second_and_comes_back(
    open_server: RunningServer, stream: bool
) -> None:
    eventually(lambda: health(open_server)[0] == 200)
    client = openai_client(open_server.url)
    ended: list[tuple[float, BaseException]] = []
    settings: dict[str, Any] = dict(model="tiny", prompt="a", max_tokens=16000, stream=stream)

    def generate() -> None:
        try:
            answer = client.completions.create(**settings, extra_body={"ignore_eos": True})
            for _ in answer if stream else ():
                pass
        except openai.APIError as error:
            ended.append((time.monotonic(), error))

    thread = threading.Thread(target=generate)
    thread.start()
    eventually(lambda: running(open_server) == 1)
    os.kill(open_server.engine_pid(), signal.SIGKILL)
    killed_at = time.monotonic()
    eventually(lambda: health(open_server)[0] == 503)
    status, body = health(open_server)
    if status == 503:  # otherwise it is already back
        assert body["error"]["code"] == "model_not_ready"
    thread.join(10)
    ended_at, error = ended[0]
    assert ended_at - killed_at < 1
    assert isinstance(error, openai.APIError) and error.code == "engine_restarted"
    assert isinstance(error, openai.InternalServerError) is not stream

    eventually(lambda: health(open_server)[0] == 200)
    again = client.completions.create(model="tiny", prompt="a", max_tokens=3)
    assert again.usage is not None and again.usage.completion_tokens > 0
    assert is_idle(open_server)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_sigterm_and_sighup_let_running_requests_finish_and_exit_with_0(
    tmp_path: Path, number: signal.Signals
) -> None:
    model = write_tiny_llama(tmp_path / "tiny.gguf", context_length=4096)
    with run_server("--model", str(model)) as server:
        client = openai_client(server.url)
        stream = client.completions.create(
            model="tiny", prompt="a", max_tokens=100, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        os.kill(server.engine_pid(), number)  # a closed terminal signals the whole group
        server.process.send_signal(number)
        reasons = [chunk.choices[0].finish_reason for chunk in stream]
        assert reasons[-1] == "length"
        assert server.process.wait(10) == 0


@pytest.mark.slow
def test_the_first_ctrl_c_gives_streams_two_seconds_and_then_an_error_event(
    endless_model: Path,
) -> None:
    with run_server("--model", str(endless_model), "--mode", "server") as server:
        client = openai_client(server.url)
        stream = client.completions.create(
            model="tiny", prompt="a", max_tokens=65000, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        begun_at = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError) as caught:
            for _ in stream:
                pass
        assert caught.value.code == "server_shutting_down"
        assert 1.5 < time.monotonic() - begun_at < 5
        assert server.process.wait(5) == 0
        assert "Traceback" not in server.output


@pytest.mark.slow
def test_the_second_ctrl_c_ends_at_once(endless_model: Path) -> None:
    with run_server("--model", str(endless_model), "--mode", "server") as server:
        engine = server.engine_pid()
        client = openai_client(server.url)
        stream = client.completions.create(
            model="tiny", prompt="a", max_tokens=65000, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        server.process.send_signal(signal.SIGINT)
        eventually(lambda: not accepts(server))
        begun_at = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        server.process.wait(5)
        assert time.monotonic() - begun_at < 1.5
        assert "Traceback" not in server.output
        eventually(lambda: not Path(f"/proc/{engine}").exists(), 3)
