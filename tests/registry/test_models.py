"""Several models at once: each request goes to the model it names, and trouble with one model does
not affect the others."""

import asyncio
import dataclasses
import errno
import http.client
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from llmsrv.api.gate import Gate
from llmsrv.config import Config
from llmsrv.engine import process
from llmsrv.errors import ApiError
from llmsrv.errors import StartupError
from llmsrv.http_app import build_http_app
from llmsrv.registry.find_models import find_models
from llmsrv.registry.models import Model
from llmsrv.registry.models import Models
from tests.support.application import ask
from tests.support.engines import in_loop
from tests.support.engines import main_that_sends_garbage
from tests.support.gguf_writer import write_tiny_llama
from tests.support.sdk import openai_client
from tests.support.server import RunningServer
from tests.support.server import eventually
from tests.support.server import run_server

LONG = 60_000  # tokens that no test waits for
UNUSABLE = ("cut", "foreign")  # refused for its text half; refused by the engine


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Three models, of which two may be loaded, and two unusable files."""
    folder = tmp_path_factory.mktemp("several")
    lengths = {"a": 65536, "b": 512, "c": 256}
    paths = [
        write_tiny_llama(folder / f"{name}.gguf", context_length=length, seed=length)
        for name, length in lengths.items()
    ]
    paths.append(folder / "cut.gguf")
    paths[-1].write_bytes(paths[0].read_bytes()[:3000])
    foreign = {"general.architecture": "foreign"}
    paths.append(write_tiny_llama(folder / "foreign.gguf", metadata=foreign))
    models = [f"--model={path.stem}={path}" for path in paths]
    limits = ["--max-loaded-models", "2", "--drain-timeout-s", "1", "--mode", "server"]
    with run_server(*models, *limits) as running:
        yield running


def call(server: RunningServer, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    host, port = server.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=20)
    connection.request(
        method, path, body and json.dumps(body), {"Content-Type": "application/json"}
    )
    response = connection.getresponse()
    content = response.read()
    is_json = response.headers["Content-Type"] == "application/json"
    return response.status, json.loads(content) if is_json else content.decode()


def load(server: RunningServer, name: str) -> None:
    status, model = call(server, "POST", "/models/load", {"model": name})
    assert status == 200, model
    assert (model["id"], model["state"]) == (name, "ready")


def unload(server: RunningServer, name: str) -> None:
    status, model = call(server, "POST", "/models/unload", {"model": name})
    assert (status, model["state"], model["max_model_len"]) == (200, "unloaded", None)


def load_only(server: RunningServer, *names: str) -> None:
    for name, state in states(server).items():
        if state != "unloaded" and name not in names:
            unload(server, name)
    for name in names:
        load(server, name)


def states(server: RunningServer) -> dict[str, str]:
    return {m["id"]: m["state"] for m in call(server, "GET", "/v1/models")[1]["data"]}


def complete(server: RunningServer, model: str, **fields: Any) -> tuple[int, Any]:
    body = {"model": model, "prompt": "abc", "max_tokens": 8, "temperature": 0} | fields
    return call(server, "POST", "/v1/completions", body)


def text_of(server: RunningServer, model: str) -> str:
    status, answer = complete(server, model)
    assert (status, answer["model"]) == (200, model)
    return str(answer["choices"][0]["text"])


def metric(server: RunningServer, name: str, model: str) -> float:
    lines = call(server, "GET", "/metrics")[1].splitlines()
    label = f'{name}{{engine="0",model_name="{model}"}} '
    return float(next(line for line in lines if line.startswith(label)).removeprefix(label))


class Stream:
    """A long stream, read in a thread; it ends with finish_reason or `error`."""

    def __init__(self, server: RunningServer, model: str, num_tokens: int = LONG) -> None:
        client = openai_client(server.url)
        self._stream = client.completions.create(
            model=model,
            prompt="a",
            max_tokens=num_tokens,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        self.num_chunks = 0
        self.finish_reason: str | None = None
        self.error: openai.APIError | None = None
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def __enter__(self) -> "Stream":
        eventually(lambda: self.num_chunks > 0)
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self.thread.join(10)

    def _read(self) -> None:
        try:
            for chunk in self._stream:
                self.num_chunks += 1
                self.finish_reason = chunk.choices[0].finish_reason
        except openai.APIError as error:
            self.error = error
        except Exception:  # httpx's, when another thread closes the stream
            pass


def test_a_request_goes_to_the_model_that_it_names(several: RunningServer) -> None:
    load_only(several, "a", "b")
    assert text_of(several, "a") != text_of(several, "b")
    status, answer = complete(several, "d")
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    lengths = {m["id"]: m["max_model_len"] for m in call(several, "GET", "/v1/models")[1]["data"]}
    assert lengths == {"a": 65536, "b": 512, "c": None, "cut": None, "foreign": None}


def test_each_model_has_its_own_metrics(several: RunningServer) -> None:
    load_only(several, "a", "b")
    name = "vllm:prompt_tokens_total"
    before = {model: metric(several, name, model) for model in "abc"}
    text_of(several, "b")
    after = {model: metric(several, name, model) - before[model] for model in "abc"}
    assert after == {"a": 0, "b": 3, "c": 0}


def test_loading_beyond_the_limit_unloads_the_least_recently_used(several: RunningServer) -> None:
    load_only(several, "a", "b")
    text_of(several, "b")
    text_of(several, "a")
    load(several, "c")
    assert [states(several)[name] for name in "abc"] == ["ready", "unloaded", "ready"]
    status, answer = complete(several, "b")
    assert (status, answer["error"]["code"]) == (503, "model_not_loaded")
    assert "/models/load" in answer["error"]["message"]


@pytest.mark.slow
def test_a_busy_model_is_not_unloaded_for_another(several: RunningServer) -> None:
    load_only(several, "a", "b")
    with Stream(several, "a") as stream:
        text_of(several, "b")
        load(several, "c")
        assert [states(several)[name] for name in "abc"] == ["ready", "unloaded", "ready"]
        assert stream.error is None


@pytest.mark.parametrize("name", ["cut", pytest.param("foreign", marks=pytest.mark.slow)])
def test_a_model_that_cannot_be_loaded_is_an_error_and_changes_nothing(
    several: RunningServer, name: str
) -> None:
    load_only(several, "a", "b")
    before = {model: text_of(several, model) for model in "ab"}
    with Stream(several, "a") as stream:
        status, answer = call(several, "POST", "/models/load", {"model": name})
        assert (status, answer["error"]["code"]) == (500, "model_refused")
        assert f"`{name}` cannot be loaded: " in answer["error"]["message"]
        assert ".gguf" not in answer["error"]["message"]
        num_chunks = stream.num_chunks
        eventually(lambda: stream.num_chunks > num_chunks)
    assert states(several) == {"a": "ready", "b": "ready", "c": "unloaded"} | dict.fromkeys(
        UNUSABLE, "unloaded"
    )
    assert {model: text_of(several, model) for model in "ab"} == before


@in_loop
async def test_an_engine_that_ends_while_it_loads_is_not_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel ends it like this if there is no memory for another model."""
    monkeypatch.setattr(process, "main", main_that_sends_garbage)
    path = write_tiny_llama(tmp_path / "x.gguf")
    models = Models(config(), [Model(["x"], path)])
    with pytest.raises(ApiError) as caught:
        await models.load("x")
    assert caught.value.message == "The model `x` cannot be loaded: the engine sent garbage"
    assert models.get("x").state_name == "unloaded"


@pytest.mark.slow
def test_unloading_a_model_ends_its_requests_after_their_grace(several: RunningServer) -> None:
    load_only(several, "a", "b")
    with Stream(several, "a") as stream:
        unloading = threading.Thread(target=unload, args=(several, "a"))
        unloading.start()
        eventually(lambda: states(several)["a"] == "unloading")
        assert complete(several, "a")[1]["error"]["code"] == "model_not_loaded"
        assert call(several, "GET", "/health")[0] == 200
        text_of(several, "b")
        stream.thread.join(10)
        assert stream.error is not None and stream.error.code == "model_unloaded"
        unloading.join(10)
    assert states(several)["a"] == "unloaded"
    assert metric(several, "vllm:num_requests_running", "a") == 0
    load(several, "a")
    assert text_of(several, "a")


def test_a_short_answer_is_finished_before_its_model_is_unloaded(several: RunningServer) -> None:
    load_only(several, "a")
    with Stream(several, "a", num_tokens=200) as stream:
        unload(several, "a")
        stream.thread.join(10)
        assert stream.finish_reason == "length"


def test_a_server_without_loaded_models_is_not_healthy(several: RunningServer) -> None:
    load_only(several)
    assert call(several, "GET", "/live")[0] == 200
    status, answer = call(several, "GET", "/health")
    assert (status, answer["error"]["code"]) == (503, "model_not_loaded")
    load(several, "b")
    assert call(several, "GET", "/health")[0] == 200


@pytest.mark.slow
def test_a_killed_engine_affects_only_its_model(several: RunningServer) -> None:
    load_only(several, "b")
    b = several.engine_pid()
    load(several, "a")
    with Stream(several, "a") as stream:
        os.kill(b, signal.SIGKILL)
        eventually(lambda: states(several)["b"] != "ready")
        assert states(several)["b"] == "restarting"
        assert complete(several, "b")[1]["error"]["code"] == "model_not_ready"
        assert call(several, "GET", "/health")[0] == 200
        eventually(lambda: states(several)["b"] == "ready")
        assert stream.error is None
    assert text_of(several, "b")


@pytest.mark.parametrize("path", ["/models/load", "/models/unload"])
def test_loading_an_unknown_model_is_404(several: RunningServer, path: str) -> None:
    status, answer = call(several, "POST", path, {"model": "../../etc/passwd"})
    assert (status, answer["error"]["code"]) == (404, "model_not_found")


@pytest.mark.slow
def test_a_signal_ends_every_engine(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf", context_length=4096)
    with run_server("--model", f"a={path}", "--model", f"b={path}") as server:
        with Stream(server, "a", num_tokens=600) as a, Stream(server, "b", num_tokens=600) as b:
            assert server.stop() == 0
            for stream in (a, b):
                stream.thread.join(10)
                assert stream.finish_reason == "length"


def test_a_single_model_may_answer_to_any_name_and_to_none(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf")
    with run_server("--model", str(path), "--any-model-name") as server:
        assert text_of(server, "gpt-4o") == text_of(server, "tiny")
        assert states(server) == {"tiny": "ready"}
        status, model = call(server, "GET", "/v1/models/org%2Fany")
        assert (status, model["id"], model["state"]) == (200, "org/any", "ready")
        for path_, fields in (
            ("/v1/completions", {"prompt": "abc", "max_tokens": 2}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ):
            status, answer = call(server, "POST", path_, fields | {"max_tokens": 2})
            assert (status, answer["model"]) == (200, "tiny")


def test_a_request_must_name_a_model_without_any_model_name() -> None:
    models = Models(Config(), [Model(["tiny"], Path("tiny.gguf"))])
    app = build_http_app(models, Gate("127.0.0.1", [], []), lambda: {})
    answer = asyncio.run(ask(app, "POST", "/v1/completions", {}, b'{"prompt": "a"}'))
    assert answer.status == 400 and b'"param": "model"' in answer.body


@pytest.mark.parametrize(
    "host, keys, headers, status",
    [
        ("127.0.0.1", [], {}, 404),
        ("0.0.0.0", [], {}, 403),
        ("0.0.0.0", ["k"], {}, 401),
        ("0.0.0.0", ["k"], {"authorization": "Bearer k"}, 404),
    ],
)
@pytest.mark.parametrize("path", ["/models/load", "/models/unload"])
def test_models_are_loaded_by_clients_with_a_key_or_on_this_machine(
    path: str, host: str, keys: list[str], headers: dict[str, str], status: int
) -> None:
    app = build_http_app(Models(Config(), []), Gate(host, [], keys), lambda: {})
    answer = asyncio.run(ask(app, "POST", path, headers, b'{"model": "none"}'))
    assert answer.status == status


def config(*models: str, **options: Any) -> Config:
    return Config(model=list(models), cache_dir=Path("/nonexistent"), **options)


def test_the_name_precedes_the_equals_sign_unless_the_whole_is_a_file(
    tmp_path: Path,
) -> None:
    path = write_tiny_llama(tmp_path / "x=1.gguf")
    models = find_models(config(str(path), f"org/y={path}"))
    assert [(model.names, model.path) for model in models] == [(["x=1"], path), (["org/y"], path)]


def test_at_least_one_model_is_required() -> None:
    with pytest.raises(StartupError, match="--model names no model"):
        find_models(config())


def test_two_models_need_different_names(tmp_path: Path) -> None:
    path = str(write_tiny_llama(tmp_path / "x.gguf"))
    with pytest.raises(StartupError, match="two models are called 'x'.*NAME=PATH"):
        find_models(config(path, f"x={path}"))


def test_an_engine_leaves_room_for_the_largest_other_models(tmp_path: Path) -> None:
    sizes = {"small.gguf": 10, "large-00001-of-00002.gguf": 30, "large-00002-of-00002.gguf": 40}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(bytes(size))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/model.safetensors").write_bytes(bytes(20))
    names = ("small.gguf", "large-00001-of-00002.gguf", "folder")
    options = config(*(f"{i}={tmp_path / name}" for i, name in enumerate(names)))
    for num_loaded, beside in ((0, [90, 30, 80]), (2, [70, 20, 70]), (1, [0, 0, 0])):
        options = dataclasses.replace(options, max_loaded_models=num_loaded)
        models = Models(options, find_models(options))
        engines = [models._engine_config(model) for model in models]
        assert [engine.other_weight_bytes for engine in engines] == beside
        assert {engine.num_engines for engine in engines} == {num_loaded or 3}


@pytest.mark.parametrize(
    "options",
    [{"served_model_name": ["z"]}, {"chat_template": "t.jinja"}, {"any_model_name": True}],
    ids=lambda options: next(iter(options)),
)
def test_options_for_a_single_model_are_refused_for_several(options: dict[str, Any]) -> None:
    with pytest.raises(StartupError, match="for one model"):
        find_models(config("x.gguf", "y.gguf", **options))


@in_loop
async def test_an_engine_that_cannot_be_started_is_the_reason_of_the_503(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("llmsrv.engine.client.EngineProcess", refuse)
    config = Config(model=[str(write_tiny_llama(tmp_path / "tiny.gguf"))], backend="reference")
    models = Models(config, find_models(config))
    await models.start()
    await asyncio.sleep(0)  # the engine's first start
    error = models.unavailable()
    assert error is not None and error.status == 503
    assert "the engine cannot be started" in error.message and "open files" in error.message
    await models.stop()
