"""Tools through the whole server in every format, by a tiny model whose tokens and template are of
that format."""

import json
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from tests.support.gguf_writer import CHATML
from tests.support.gguf_writer import CONTROL
from tests.support.gguf_writer import tiny_vocabulary
from tests.support.gguf_writer import write_tiny_llama
from tests.support.server import run_server

TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "strict": True,
            "parameters": {"type": "object", "properties": {"a": {"enum": [1, 2]}}},
        },
    }
    for name in ("first", "second")
]
# Format -> its special tokens, what its template writes of calls, and whether it thinks.
FORMATS = {
    "hermes": (["<tool_call>", "</tool_call>"], "<tool_call>", False),
    "llama3": (["<|python_tag|>"], "<|python_tag|>", False),
    "mistral": (["[TOOL_CALLS]"], "[TOOL_CALLS]", False),
    "json": ([], "", False),
    "hermes, thinking": (["<think>", "</think>"], "<tool_call></think>", True),
}


def write_model(path: Path, specials: list[str], writes: str) -> Path:
    vocabulary = tiny_vocabulary()
    tokens, types = vocabulary["tokenizer.ggml.tokens"], vocabulary["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list) and isinstance(types, list)
    template = "{% if tools %}{{ tools | length }}" + writes + "{% endif %}" + CHATML
    metadata = {
        "tokenizer.ggml.tokens": tokens + specials,
        "tokenizer.ggml.token_type": types + [CONTROL] * len(specials),
        "tokenizer.chat_template": template,
    }
    num_tokens = len(tokens) + len(specials)
    return write_tiny_llama(path, vocab_size=num_tokens, metadata=metadata)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_tools_are_called_in_the_format_of_the_model(tmp_path: Path, name: str) -> None:
    specials, writes, thinks = FORMATS[name]
    model = write_model(tmp_path / "tiny.gguf", specials, writes)
    with run_server("--model", str(model)) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        settings: dict[str, Any] = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "hello"}],
            "tools": TOOLS,
            "tool_choice": "required",
            "parallel_tool_calls": False,
            "max_tokens": 300,
            # Thoughts of a random model find no end by themselves.
            "logit_bias": {str(270 + 1): 20} if thinks else {},
        }
        for seed in range(4):
            choice = client.chat.completions.create(**settings, seed=seed).choices[0]
            assert choice.finish_reason == "tool_calls", choice
            assert choice.message.content is None
            (call,) = choice.message.tool_calls or ()
            assert call.type == "function" and call.function.name in ("first", "second")
            assert set(json.loads(call.function.arguments)) <= {"a"}
            assert streamed(client, settings | {"seed": seed}) == call.function.arguments
            if name == "mistral":
                assert len(call.id) == 9
            if thinks:
                assert hasattr(choice.message, "reasoning_content")


def streamed(client: OpenAI, settings: dict[str, Any]) -> str:
    arguments = ""
    for chunk in client.chat.completions.create(**settings, stream=True):
        for delta in chunk.choices[0].delta.tool_calls or ():
            arguments += (delta.function and delta.function.arguments) or ""
    return arguments
