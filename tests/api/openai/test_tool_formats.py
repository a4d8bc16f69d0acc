"""Tool calls in every format, through the whole server, with a tiny model made for the format."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from openai import OpenAI

from llmsrv.api.generation.prompt import prompt_ids
from llmsrv.api.openai.conversation import conversation_of
from llmsrv.api.openai.schema import ChatCompletionRequest
from llmsrv.files.gguf import open_gguf
from llmsrv.text.chat_template import ChatTemplate
from llmsrv.text.tokenizer import load_tokenizer
from tests.support.gguf_writer import CHATML
from tests.support.gguf_writer import CONTROL
from tests.support.gguf_writer import tiny_vocabulary
from tests.support.gguf_writer import write_gguf
from tests.support.gguf_writer import write_tiny_llama
from tests.support.sdk import openai_client
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
FIRST_BYTE = 3  # id of the byte 0 in the tiny vocabulary
# Format -> special tokens, the text that its template is recognised by, whether the model thinks.
FORMATS = {
    "hermes": (["<tool_call>", "</tool_call>"], "<tool_call>", False),
    "llama3": (["<|python_tag|>"], "<|python_tag|>", False),
    "mistral": (["[TOOL_CALLS]"], "[TOOL_CALLS]", False),
    "json": ([], "", False),
    "qwen3_coder": (["<tool_call>", "</tool_call>"], "<tool_call><function=<parameter=", False),
    "deepseek_v31": (
        ["<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>"]
        + ["<｜tool▁call▁end｜>", "<｜tool▁sep｜>"],
        "<｜tool▁calls▁begin｜>",
        False,
    ),
    "lfm2": (["<|tool_call_start|>", "<|tool_call_end|>"], "<|tool_call_start|>", False),
    "deepseek_v32": (["<think>"], "｜DSML｜", False),  # the marks are no tokens of their own
    "functiongemma": (
        ["<start_function_call>", "<end_function_call>", "<escape>"], "<start_function_call>", False
    ),
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
        client = openai_client(server.url)
        settings: dict[str, Any] = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "hello"}],
            "tools": TOOLS,
            "tool_choice": "required",
            "parallel_tool_calls": False,
            "max_tokens": 300,
            # A random model would hardly ever end its reasoning.
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "likely"),
    [
        ("hermes", ""),
        ("mistral", ""),
        ("llama3", "{"),
        ("json", "{"),
        ("qwen3_coder", ""),
        ("deepseek_v31", ""),
        ("lfm2", ""),
        ("functiongemma", ""),
    ],
)
def test_optional_calls_of_strict_tools_follow_their_schemas(
    tmp_path: Path, name: str, likely: str
) -> None:
    specials, writes, _ = FORMATS[name]
    # A random model hardly ever begins a call without a bias.
    opening = len(tiny_vocabulary()["tokenizer.ggml.tokens"])  # type: ignore[arg-type]
    begins_call = str(FIRST_BYTE + ord(likely) if likely else opening)
    model = write_model(tmp_path / "tiny.gguf", specials, writes)
    with run_server("--model", str(model)) as server:
        client = openai_client(server.url)
        answer = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "hello"}],
            tools=TOOLS,
            max_tokens=150,
            seed=3,
            logit_bias={begins_call: 100},
        )
        calls = answer.choices[0].message.tool_calls or []
        complete = calls if answer.choices[0].finish_reason == "tool_calls" else calls[:-1]
        assert complete
        for call in complete:
            assert call.type == "function"
            assert set(json.loads(call.function.arguments)) <= {"a"}
        if likely:  # without the bias, the answer is text
            other = client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": "hello"}],
                tools=TOOLS,
                max_tokens=20,
                logit_bias={begins_call: -100},
            ).choices[0]
            assert other.message.content and not other.message.tool_calls


@pytest.mark.parametrize(
    "name",
    ["hermes", *(pytest.param(name, marks=pytest.mark.slow) for name in ("json", "qwen3_coder"))],
)
def test_a_call_cut_by_max_tokens_leaves_no_markup_in_the_content(
    tmp_path: Path, name: str
) -> None:
    _, writes, _ = FORMATS[name]
    model = write_model(tmp_path / "tiny.gguf", [], writes)  # the marks take many tokens
    with run_server("--model", str(model)) as server:
        client = openai_client(server.url)
        for max_tokens in range(1, 60, 3):
            choice = client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": "hello"}],
                tools=TOOLS,
                tool_choice="required",
                max_tokens=max_tokens,
            ).choices[0]
            assert choice.finish_reason in ("length", "tool_calls")
            assert not choice.message.content


@pytest.mark.slow
def test_an_answer_follows_its_format_or_calls_tools(tmp_path: Path) -> None:
    specials, writes, _ = FORMATS["hermes"]
    opening = len(tiny_vocabulary()["tokenizer.ggml.tokens"])  # type: ignore[arg-type]
    model = write_model(tmp_path / "tiny.gguf", specials, writes)
    form = {"type": "object", "properties": {"b": {"enum": [3]}}, "additionalProperties": False}
    schema = {"type": "json_schema", "json_schema": {"name": "b", "schema": form}}
    with run_server("--model", str(model)) as server:
        client = openai_client(server.url)
        for bias in (-100, 100):
            body: dict[str, Any] = {"parallel_tool_calls": False, "response_format": schema}
            choice = client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": "hello"}],
                tools=TOOLS,
                max_tokens=150,
                seed=3,
                logit_bias={str(opening): bias},
                extra_body=body,
            ).choices[0]
            assert choice.finish_reason == ("stop" if bias < 0 else "tool_calls")
            if bias < 0:
                assert set(json.loads(choice.message.content or "")) <= {"b"}
            else:
                assert choice.message.tool_calls and not choice.message.content


# Like DeepSeek's templates: arguments are strings, and a message of calls has no content.
SPELLED = (
    "{% for m in messages %}{% if m.tool_calls %}{% for c in m.tool_calls %}"
    "{{ 'call ' + c['function']['arguments'] }}{% endfor %}{% endif %}"
    "{% if m.content is not none %}{{ m.role + ' ' + m.content }}{% endif %}{% endfor %}"
    "{{ tools | length if tools else '' }}"
)


def test_a_template_gets_arguments_as_strings_if_it_fails_with_objects(tmp_path: Path) -> None:
    vocabulary = tiny_vocabulary() | {"tokenizer.chat_template": SPELLED}
    tokenizer = load_tokenizer(open_gguf(write_gguf(tmp_path / "m.gguf", vocabulary)))
    service: Any = SimpleNamespace(
        text=SimpleNamespace(template=ChatTemplate(SPELLED, tokenizer), tokenizer=tokenizer),
        config=SimpleNamespace(tool_call_parser="auto"),
    )
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [call]}]
    body = msgspec.convert({"model": "m", "messages": messages}, ChatCompletionRequest)
    ids = asyncio.run(prompt_ids(service, conversation_of(body), body))
    text = b"".join(map(tokenizer.token_bytes, ids)).decode()
    assert text == 'user hicall {"a": 1}'


def streamed(client: OpenAI, settings: dict[str, Any]) -> str:
    arguments = ""
    for chunk in client.chat.completions.create(**settings, stream=True):
        for delta in chunk.choices[0].delta.tool_calls or ():
            arguments += (delta.function and delta.function.arguments) or ""
    return arguments
