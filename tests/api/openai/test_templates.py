"""Conversations with tools on the wire, with models whose templates take little, through the
OpenAI SDK and with its own answers sent back."""

from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI

from tests.support.gguf_writer import write_tiny_llama
from tests.support.sdk import openai_client
from tests.support.server import RunningServer
from tests.support.server import run_server
from tests.support.template_shapes import SHAPES
from tests.support.tiny_requests import MESSAGES
from tests.support.tiny_requests import WEATHER

pytestmark = pytest.mark.slow
MODELS = ("nemo", "llama3.1", "gemma2", "phi3", "qwen3.8", "granite3.3", "devstral")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("models")
    options: list[str] = []
    for name in MODELS:
        metadata = {"tokenizer.chat_template": SHAPES[name].source}
        path = folder / f"{name}.gguf"
        model = write_tiny_llama(path, context_length=4096, metadata=metadata)
        options += ["--model", f"{name}={model}"]
    with run_server(*options) as server:
        yield server


@pytest.fixture(scope="module")
def client(running: RunningServer) -> OpenAI:
    return openai_client(running.url)


@pytest.mark.parametrize("model", MODELS)
def test_our_own_answers_are_taken_back(client: OpenAI, model: str) -> None:
    messages: list[Any] = [{"role": "developer", "content": "be brief"}, *MESSAGES]
    tools: Any = [WEATHER]
    for seed in range(3):
        fields: dict[str, Any] = {"model": model, "tools": tools, "seed": seed}
        answer = client.chat.completions.create(
            messages=messages, tool_choice="required", max_tokens=300, **fields
        )
        message = answer.choices[0].message
        messages.append(message)
        assert message.content is None and message.tool_calls
        for call in message.tool_calls:
            messages.append({"role": "tool", "tool_call_id": call.id, "content": "sunny"})
        stream = client.chat.completions.create(
            messages=messages, tool_choice="none", max_tokens=5, stream=True, **fields
        )
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] in ("stop", "length")
        messages.append({"role": "user", "content": "and now?"})


def test_a_required_call_is_one_where_the_template_takes_one(client: OpenAI) -> None:
    for seed in range(4):
        fields: dict[str, Any] = {
            "model": "llama3.1", "messages": MESSAGES, "tools": [WEATHER], "seed": seed,
            "tool_choice": "required", "max_tokens": 300,
        }
        choice = client.chat.completions.create(**fields).choices[0]
        assert choice.finish_reason == "tool_calls"
        assert len(choice.message.tool_calls or ()) == 1
        stream = client.chat.completions.create(**fields, stream=True)
        deltas = [d for chunk in stream for d in chunk.choices[0].delta.tool_calls or ()]
        assert {delta.index for delta in deltas} == {0}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "arguments", ["", "null", '{"city": "\\ud83d"}', '{"city": "Ro'], ids=ascii
)
def test_a_history_with_odd_arguments_is_answered(
    client: OpenAI, model: str, arguments: str
) -> None:
    call = {"name": "get_weather", "arguments": arguments}
    assistant: Any = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": f"call_{n}", "type": "function", "function": call} for n in "ab"],
    }
    results: list[Any] = [
        {"role": "tool", "tool_call_id": f"call_{n}", "content": "sunny"} for n in "ab"
    ]
    messages = [*MESSAGES, assistant, *results, {"role": "system", "content": "be brief"}]
    tools: Any = [WEATHER]
    for stream in (False, True):
        response = client.chat.completions.with_raw_response.create(
            model=model, messages=messages, tools=tools, max_tokens=1, stream=stream
        )
        assert response.status_code == 200
