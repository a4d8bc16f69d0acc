"""Model files that are replaced or deleted while they are served."""

import http.client
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmsrv.registry.model_files import total_bytes
from llmsrv.registry.model_files import version_of
from tests.support.gguf_writer import write_tiny_llama
from tests.support.server import RunningServer
from tests.support.server import eventually
from tests.support.server import run_server


def call(server: RunningServer, path: str, body: Any = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=20)
    method, headers = ("POST" if body else "GET"), {"Content-Type": "application/json"}
    connection.request(method, path, body and json.dumps(body), headers)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def complete(server: RunningServer) -> tuple[int, Any]:
    # The last of these ids is in the larger vocabulary only.
    return call(server, "/v1/completions", {"model": "tiny", "prompt": [5, 299], "max_tokens": 4})


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    path = write_tiny_llama(tmp_path / "tiny.gguf", vocab_size=300)
    with run_server("--model", str(path)) as running:
        yield running


def kill_engine(server: RunningServer) -> None:
    pid = server.engine_pid()
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: call(server, "/health")[0] == 503)


def test_a_file_that_was_replaced_is_loaded_with_its_tokenizer(
    server: RunningServer, tmp_path: Path
) -> None:
    assert complete(server)[0] == 200
    other = write_tiny_llama(tmp_path / "other.gguf", context_length=256)
    os.replace(other, tmp_path / "tiny.gguf")
    assert complete(server)[0] == 200  # the loaded model is not affected
    kill_engine(server)
    eventually(lambda: call(server, "/health")[0] == 200)
    status, answer = complete(server)
    assert status == 400 and "token ids must be below" in answer["error"]["message"]
    _, models = call(server, "/v1/models")
    assert models["data"][0]["max_model_len"] == 256
    assert "were replaced; loading them" in server.output


@pytest.mark.slow
def test_a_file_that_was_deleted_is_the_reason_of_503s_until_it_is_back(
    server: RunningServer, tmp_path: Path
) -> None:
    shutil.copy2(tmp_path / "tiny.gguf", tmp_path / "copy.gguf")
    (tmp_path / "tiny.gguf").unlink()
    kill_engine(server)
    reason = "the engine could not load the model"
    eventually(lambda: reason in call(server, "/health")[1].get("error", {}).get("message", ""))
    assert complete(server)[0] == 503
    os.replace(tmp_path / "copy.gguf", tmp_path / "tiny.gguf")
    eventually(lambda: call(server, "/health")[0] == 200, 20)
    assert complete(server)[0] == 200


def test_a_file_that_was_replaced_by_an_unusable_one_is_unloaded(
    server: RunningServer, tmp_path: Path
) -> None:
    (tmp_path / "other").write_bytes(b"not a model")
    os.replace(tmp_path / "other", tmp_path / "tiny.gguf")
    kill_engine(server)
    eventually(lambda: "cannot be loaded" in call(server, "/health")[1]["error"]["message"])
    status, answer = complete(server)
    assert status == 503 and "GGUF" in answer["error"]["message"]
    assert "tiny.gguf" in server.output.splitlines()[-1]


def test_the_version_of_files_changes_with_any_of_them(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    parts = [tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    for number, file in enumerate([*parts, folder / "a.safetensors", folder / "config.json"]):
        file.write_bytes(bytes(number + 1))
    assert (total_bytes(parts[0]), total_bytes(folder)) == (3, 3)
    paths = [parts[0], folder]
    versions = [version_of(paths)]
    for file in (parts[1], folder / "config.json"):
        replacement = tmp_path / "new"
        replacement.write_bytes(file.read_bytes())
        os.replace(replacement, file)
        versions.append(version_of(paths))
    assert all(versions.count(version) == 1 for version in versions)
    assert version_of(paths) == versions[-1]
    assert version_of([tmp_path / "none.gguf"]) is None
