"""The application under uvicorn, as a user starts it: uvicorn --factory llmsrv.app:build."""

import http.client
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.engines import has_exited
from tests.support.gguf_writer import write_tiny_llama
from tests.support.sdk import openai_client
from tests.support.server import RunningServer
from tests.support.server import eventually
from tests.support.server import is_idle
from tests.support.server import run_server

UVICORN = (sys.executable, "-m", "uvicorn", "--factory", "llmsrv.app:build")
QUESTION = {"role": "user", "content": "Hello!"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("m") / "tiny.gguf", context_length=16384)


def start_long_request(server: RunningServer, is_streamed: bool) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=10)
    body = {"model": "tiny", "prompt": "a", "max_tokens": 16000, "ignore_eos": True}
    data = json.dumps(body | {"stream": is_streamed})
    connection.request("POST", "/v1/completions", data, {"Content-Type": "application/json"})
    return connection


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[RunningServer]:
    with run_server(command=UVICORN, environment={"LLMSRV_MODEL": str(model)}) as running:
        yield running


def test_a_chat_is_answered_whole_and_as_a_stream(server: RunningServer) -> None:
    client = openai_client(server.url)
    asked = {"model": "tiny", "messages": [QUESTION], "max_tokens": 8, "seed": 1}
    whole = client.chat.completions.create(**asked)  # type: ignore[call-overload]
    stream = client.chat.completions.create(**asked, stream=True)  # type: ignore[call-overload]
    chunks = [chunk.choices[0] for chunk in stream]
    text = "".join(chunk.delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert chunks[-1].finish_reason == whole.choices[0].finish_reason


def test_head_has_the_length_of_the_body_and_no_body(server: RunningServer) -> None:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=10)
    for _ in range(2):  # the connection can be used again
        connection.request("HEAD", "/health")
        response = connection.getresponse()
        assert (response.status, response.read()) == (200, b"")
        assert response.headers["Content-Length"] == str(len('{"status":"ok"}'))


def test_a_stream_that_fails_ends_with_an_error_event_and_is_visibly_incomplete(
    model: Path,
) -> None:
    with run_server(command=UVICORN, environment={"LLMSRV_MODEL": str(model)}) as server:
        response = start_long_request(server, is_streamed=True).getresponse()
        assert response.readline().startswith(b"data:")
        os.kill(server.engine_pid(), signal.SIGKILL)
        with pytest.raises(http.client.IncompleteRead) as caught:
            response.read()
        last_event = caught.value.partial.split(b"\n\n")[-2]
        assert b'"code": "engine_restarted"' in last_event
        assert server.stop() in (0, -signal.SIGTERM)
        assert "Traceback" not in server.output


def leave(server: RunningServer, is_streamed: bool) -> None:
    """Starts a long request and closes the connection while it runs."""
    connection = start_long_request(server, is_streamed)
    if is_streamed:
        assert connection.getresponse().readline().startswith(b"data:")
    else:
        eventually(lambda: not is_idle(server))
    connection.close()
    eventually(lambda: is_idle(server))


def test_neither_clients_that_leave_nor_sigterm_are_errors_and_the_engine_ends(
    model: Path,
) -> None:
    with run_server(command=UVICORN, environment={"LLMSRV_MODEL": str(model)}) as server:
        leave(server, is_streamed=True)
        leave(server, is_streamed=False)
        pid = server.engine_pid()
        assert server.stop() in (0, -signal.SIGTERM)
        assert has_exited(pid, 5.0)
        eventually(lambda: "Application shutdown complete" in server.output)
        assert "Traceback" not in server.output and "ERROR" not in server.output


def test_a_bad_model_ends_the_startup_with_its_sentence(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"not a model at all, but long enough to look at")
    environment = {"LLMSRV_MODEL": str(path)}
    with run_server(command=UVICORN, environment=environment, wait=False) as server:
        assert server.process.wait(30) == 3
        eventually(lambda: "Application startup failed. Exiting." in server.output)
        assert "broken.gguf" in server.output
        assert "Traceback" not in server.output
