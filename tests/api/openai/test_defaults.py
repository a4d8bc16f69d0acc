"""Sampling defaults come from the model, and a request's own values win; names of models."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from llmsrv.api.generation.submit import sampling_of
from llmsrv.api.openai.schema import ChatCompletionRequest
from llmsrv.registry.find_models import name_of
from llmsrv.registry.service import load_text_model
from tests.support.gguf_writer import write_tiny_llama
from tests.support.sdk import openai_client
from tests.support.server import RunningServer
from tests.support.server import run_server

TINY = Path(__file__).parents[2] / "data" / "golden" / "tiny"
RECOMMENDED = {
    "general.sampling.temp": 0.5,
    "general.sampling.top_k": 20,
    "general.sampling.top_p": 0.75,
    "general.sampling.min_p": 0.25,
    "general.sampling.penalty_repeat": 1.5,
}


def request(**fields: object) -> ChatCompletionRequest:
    message = {"role": "user", "content": "a"}
    return msgspec.convert({"model": "m", "messages": [message], **fields}, ChatCompletionRequest)


def defaults_of(path: Path) -> dict[str, float]:
    return load_text_model(path, None, path.parent / "cache").sampling_defaults


def test_sampling_defaults_come_from_a_gguf_file(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf", metadata=RECOMMENDED)
    defaults = defaults_of(path)
    sampling = sampling_of(request(), defaults, -1)
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.5, 20, 0.75)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.25, 1.5)


def test_a_request_overrides_its_model_s_sampling_defaults() -> None:
    defaults = {"temperature": 0.5, "top_k": 20, "top_p": 0.75, "min_p": 0.25}
    body = request(temperature=0, top_k=-1, top_p=1, min_p=0)
    sampling = sampling_of(body, defaults, -1)
    assert (sampling.temperature, sampling.top_k) == (0, 0)
    assert (sampling.top_p, sampling.min_p) == (1, 0)


def test_without_sampling_defaults_those_of_openai_apply(tmp_path: Path) -> None:
    defaults = defaults_of(write_tiny_llama(tmp_path / "m.gguf"))
    assert defaults == {}
    sampling = sampling_of(request(), defaults, -1)
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (1.0, 0, 1.0)
    assert sampling.min_p == 0.0


@pytest.fixture(scope="module")
def greedy_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Serves a folder whose generation_config.json sets greedy sampling."""
    folder = tmp_path_factory.mktemp("models") / "My-Model"
    shutil.copytree(TINY / "qwen3", folder)
    (folder / "generation_config.json").write_text('{"top_k": 1, "eos_token_id": [1, 3]}')
    with run_server("--model", f"{folder}/") as running:
        yield running


def test_a_folder_is_served_under_its_own_name(greedy_server: RunningServer) -> None:
    client = openai_client(greedy_server.url)
    assert [model.id for model in client.models.list().data] == ["My-Model"]


def test_answers_use_the_model_s_sampling_defaults(greedy_server: RunningServer) -> None:
    client = openai_client(greedy_server.url)

    def answer(**fields: float) -> str:
        completion = client.completions.create(
            model="My-Model", prompt="the cat", max_tokens=12, **fields
        )
        return completion.choices[0].text

    greedy = answer(temperature=0)
    assert {answer(seed=seed) for seed in range(4)} == {greedy}
    free = {answer(seed=seed, extra_body={"top_k": 0}) for seed in range(4)}  # type: ignore
    assert len(free) > 1


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        ("models/tiny.gguf", "tiny"),
        ("/a/b/My-Model", "My-Model"),
        ("/a/b/My-Model/", "My-Model"),
        ("/a/b/My-Model/.", "My-Model"),
        ("big-00001-of-00003.gguf", "big"),
        ("SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct"),
        ("hf:org/name", "name"),
        ("hf:org/name:file-Q4_K_M.gguf", "file-Q4_K_M"),
        ("hf:org/name:sub/big-00001-of-00003.gguf", "big"),
    ],
)
def test_a_model_is_served_under_the_last_part_of_its_path(model: str, wanted: str) -> None:
    assert name_of(model) == wanted
