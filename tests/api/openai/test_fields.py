"""Fields of requests beyond the usual ones, on a tiny random model: each does what it says."""

import json
import typing
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import Completion
from openai.types import completion_create_params
from openai.types.chat import ChatCompletion
from openai.types.chat import ChatCompletionAssistantMessageParam
from openai.types.chat import ChatCompletionChunk
from openai.types.chat import ChatCompletionContentPartTextParam
from openai.types.chat import ChatCompletionStreamOptionsParam
from openai.types.chat import ChatCompletionToolMessageParam
from openai.types.chat import ChatCompletionUserMessageParam
from openai.types.chat import completion_create_params as chat_create_params
from hypothesis import given
from hypothesis import strategies as st
from openai import OpenAI

from llmsrv.api.decode import check_other_fields
from llmsrv.api.generation import submit as generate
from llmsrv.api.openai.schema import ChatCompletionRequest
from llmsrv.api.openai.schema import CompletionRequest
from llmsrv.api.openai.schema import ContentPart
from llmsrv.api.openai.schema import Message
from llmsrv.api.openai.schema import StreamOptions
from llmsrv.api.openai.schema import UNSUPPORTED
from llmsrv.errors import ApiError
from tests.support.gguf_writer import CONTROL
from tests.support.gguf_writer import tiny_vocabulary
from tests.support.gguf_writer import write_tiny_llama
from tests.support.sdk import openai_client
from tests.support.server import RunningServer
from tests.support.server import gauges
from tests.support.server import run_server
from tests.support.servers import KEY

MESSAGES: list[Any] = [{"role": "user", "content": "hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
        },
    },
}
REFERENCE = {"type": "function", "function": {"name": "get_weather"}}


@pytest.fixture(scope="module")
def roomy_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    """A tiny model with room for tools, and a server that is strict and debugged."""
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    model = write_tiny_llama(path, context_length=2048)
    with run_server("--model", str(model), "--enable-debug", "--strict-fields") as running:
        yield openai_client(running.url)


def complete(client: OpenAI, prompt: Any = "hello", **fields: Any) -> Any:
    known = {name: fields.pop(name) for name in ("n", "stream") if name in fields}
    body = {"max_tokens": 8, "seed": 1, **fields}
    return client.completions.create(model="tiny", prompt=prompt, **known, extra_body=body)


def chat(client: OpenAI, messages: list[Any] = MESSAGES, **fields: Any) -> Any:
    body = {"max_tokens": 8, "seed": 1, **fields}
    return client.chat.completions.create(model="tiny", messages=messages, extra_body=body)


# ---- The prompt told again


def test_echo_puts_the_prompt_before_each_choice(tiny_client: OpenAI) -> None:
    plain = complete(tiny_client, ["hello", "the"], n=2)
    echoed = complete(tiny_client, ["hello", "the"], n=2, echo=True)
    prompts = ["hello", "hello", "the", "the"]
    for choice, other, prompt in zip(echoed.choices, plain.choices, prompts, strict=True):
        assert choice.text == prompt + other.text
    assert echoed.usage.total_tokens == plain.usage.total_tokens


def test_83_a_nul_character_is_one_as_any_other(tiny_client: OpenAI) -> None:
    assert complete(tiny_client, "he\0llo", echo=True).choices[0].text.startswith("he\0llo")


def test_echo_with_logprobs_has_every_token_with_its_place(tiny_client: OpenAI) -> None:
    choice = complete(tiny_client, "hello the", echo=True, logprobs=2, temperature=0).choices[0]
    logprobs = choice.logprobs
    assert logprobs.tokens[:2] == ["hello", " the"]
    assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
    assert all(value < 0 for value in logprobs.token_logprobs[1:])
    assert all(0 < len(top) <= 2 for top in logprobs.top_logprobs[2:])
    assert logprobs.text_offset[:3] == [0, 5, 9]
    assert logprobs.text_offset == sorted(logprobs.text_offset)


def test_prompt_logprobs_are_those_of_the_echo(tiny_client: OpenAI) -> None:
    prompt = [106, 20, 30, 40]
    echoed = complete(tiny_client, prompt, echo=True, logprobs=3).choices[0].logprobs
    told = complete(tiny_client, prompt, prompt_logprobs=3).choices[0].prompt_logprobs
    assert told[0] is None
    for id, tokens, logprob in zip(prompt[1:], told[1:], echoed.token_logprobs[1:4], strict=True):
        assert tokens[str(id)]["logprob"] == logprob
        ranks = [token["rank"] for token in tokens.values() if token["rank"]]
        assert sorted(ranks) == [1, 2, 3]


def test_a_chat_tells_of_its_prompt_too(tiny_client: OpenAI) -> None:
    answer = chat(tiny_client, prompt_logprobs=0, return_token_ids=True)
    assert len(answer.prompt_logprobs) == len(answer.prompt_token_ids)
    assert answer.choices[0].logprobs is None


def test_token_ids_are_as_many_as_usage_counts(tiny_client: OpenAI) -> None:
    answer = complete(tiny_client, "hello", n=3, stop=["a", "e"], return_token_ids=True)
    assert sum(len(choice.token_ids) for choice in answer.choices) == answer.usage.completion_tokens
    assert answer.usage.prompt_tokens == len(answer.choices[0].prompt_token_ids)


def test_a_prompt_is_truncated_at_its_beginning(tiny_client: OpenAI) -> None:
    answer = complete(
        tiny_client, [9, 8, 7, 6], truncate_prompt_tokens=2, return_token_ids=True
    )
    assert answer.choices[0].prompt_token_ids == [7, 6]
    most = complete(tiny_client, [9] * 2000, truncate_prompt_tokens=-1)
    assert most.usage.total_tokens == 512
    whole = chat(tiny_client, return_token_ids=True).prompt_token_ids
    cut = chat(tiny_client, return_token_ids=True, truncate_prompt_tokens=5).prompt_token_ids
    assert cut == whole[-5:]


# ---- Choices and their text


def test_best_of_gives_the_likeliest_choices_and_counts_all(tiny_client: OpenAI) -> None:
    all_of_them = complete(tiny_client, n=6, logprobs=0)
    means = [sum(c.logprobs.token_logprobs) / len(c.logprobs.tokens) for c in all_of_them.choices]
    ranked = sorted(zip(means, all_of_them.choices), key=lambda pair: -pair[0])
    best = complete(tiny_client, n=2, best_of=6)
    assert [choice.text for choice in best.choices] == [choice.text for _, choice in ranked[:2]]
    assert [choice.index for choice in best.choices] == [0, 1]
    assert best.choices[0].logprobs is None
    assert best.usage.completion_tokens == all_of_them.usage.completion_tokens


def test_what_ended_an_answer_is_kept_on_demand(tiny_client: OpenAI) -> None:
    whole = complete(tiny_client, temperature=0).choices[0].text
    stop = whole[2:4]
    kept = complete(tiny_client, temperature=0, stop=stop, include_stop_str_in_output=True)
    cut = complete(tiny_client, temperature=0, stop=stop)
    assert kept.choices[0].text == whole[: whole.index(stop) + len(stop)]
    assert cut.choices[0].text == whole[: whole.index(stop)]
    assert kept.usage.completion_tokens == cut.usage.completion_tokens


def test_special_tokens_are_shown_on_demand(tiny_client: OpenAI) -> None:
    fields = {"logit_bias": {"1": 100}, "max_tokens": 2}
    assert complete(tiny_client, **fields).choices[0].text == ""
    shown = complete(tiny_client, **fields, skip_special_tokens=False)
    assert shown.choices[0].text == "<|im_start|>" * 2


def test_an_answer_ends_though_every_token_is_discouraged(tiny_client: OpenAI) -> None:
    answer = complete(tiny_client, logit_bias={str(id): -100 for id in range(270)})
    assert answer.usage.completion_tokens > 0


def test_requests_of_different_salts_share_no_prefix(tiny_client: OpenAI) -> None:
    def num_cached(**fields: Any) -> int:
        usage = complete(tiny_client, [77] * 40, max_tokens=1, **fields).usage
        return int(usage.prompt_tokens_details.cached_tokens)

    assert num_cached(cache_salt="one") == 0
    assert num_cached(cache_salt="one") == 39
    assert num_cached(cache_salt="two") == 0


def test_usage_is_told_with_each_chunk_on_demand(tiny_client: OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(complete(tiny_client, stream=True, stream_options=options, ignore_eos=True))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts) and counts[0] > 0 and counts[-1] == 8


def test_a_vocabulary_without_the_tokens_cannot_fill_in(tiny_client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(tiny_client, suffix="the end")
    assert caught.value.param == "suffix"


@pytest.mark.slow
def test_a_suffix_is_filled_in_by_the_tokens_of_the_vocabulary(tmp_path: Path) -> None:
    vocabulary = tiny_vocabulary()
    texts = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
    num_tokens = len(vocabulary["tokenizer.ggml.tokens"])  # type: ignore[arg-type]
    metadata = {
        "tokenizer.ggml.tokens": [*vocabulary["tokenizer.ggml.tokens"], *texts],  # type: ignore
        "tokenizer.ggml.token_type": [*vocabulary["tokenizer.ggml.token_type"], *[CONTROL] * 3],  # type: ignore # noqa: E501
    }
    model = write_tiny_llama(
        tmp_path / "tiny.gguf", vocab_size=num_tokens + 3, metadata=metadata
    )
    with run_server("--model", str(model)) as server:
        client = openai_client(server.url)
        ids = complete(client, "hello", suffix="he", return_token_ids=True).choices[0]
        before, between, behind = range(num_tokens, num_tokens + 3)
        hello, he = complete(client, ["hello", "he"], return_token_ids=True).choices
        wanted = [before, *hello.prompt_token_ids, between, *he.prompt_token_ids, behind]
        assert ids.prompt_token_ids == wanted


# ---- Messages and tools


def test_an_answer_goes_on_with_the_last_message(tiny_client: OpenAI) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "the wo"}]
    answer = chat(tiny_client, messages, continue_final_message=True, return_token_ids=True)
    prompt = complete(tiny_client, answer.prompt_token_ids, echo=True).choices[0].text
    assert prompt.startswith(
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nthe wo"
    )
    with pytest.raises(openai.BadRequestError, match="the assistant's"):
        chat(tiny_client, continue_final_message=True)


@pytest.mark.parametrize("depth", [100, 400, 960, 100_000])
def test_tools_nested_beyond_reason_are_refused(tiny_server: RunningServer, depth: int) -> None:
    parameters = '{"a":' * depth + "{}" + "}" * depth
    tools = [{"type": "function", "function": {"name": "f", "parameters": "HERE"}}]
    body = json.dumps({"model": "tiny", "messages": MESSAGES, "tools": tools})
    body = body.replace('"HERE"', parameters)
    status, error = post_body(tiny_server, "/v1/chat/completions", body)
    assert status == 400
    assert error["code"] in ("context_length_exceeded", "invalid_value", "invalid_json")


@pytest.mark.slow
def test_arguments_nested_beyond_reason_are_text(roomy_client: OpenAI) -> None:
    call = {"name": "f", "arguments": "[" * 100_000}
    message = {"role": "assistant", "tool_calls": [{"id": "1", "function": call}]}
    with pytest.raises(openai.BadRequestError) as caught:
        chat(roomy_client, [*MESSAGES, message])
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.slow
def test_tools_calls_and_results_reach_a_template_that_knows_none(roomy_client: OpenAI) -> None:
    call = {"name": "get_weather", "arguments": '{"city": "Rome"}'}
    messages = [
        {"role": "developer", "content": "Be brief."},
        *MESSAGES,
        {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": call}]},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "rain"}]},
        {"role": "tool", "tool_call_id": "2", "content": "snow"},
    ]
    answer = chat(roomy_client, messages, tools=[WEATHER], return_token_ids=True, max_tokens=1)
    prompt = complete(roomy_client, answer.prompt_token_ids, echo=True, max_tokens=1)
    text = prompt.choices[0].text
    assert text.startswith("<|im_start|>system\nBe brief.\n\nYou may call")
    assert '"name": "get_weather"' in text and "<tools>" in text
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n' in text
    assert "user\n<tool_response>\nrain\n</tool_response>\n<tool_response>\nsnow\n" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {"type": "function", "function": {"name": "get_weather"}},
        {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [REFERENCE]}},
    ],
    ids=str,
)
def test_a_tool_is_called_where_it_must_be(roomy_client: OpenAI, choice: Any) -> None:
    fields = {"tools": [WEATHER], "tool_choice": choice, "parallel_tool_calls": False}
    answer = chat(roomy_client, **fields, max_tokens=120).choices[0]
    assert answer.finish_reason == "tool_calls" and answer.message.content is None
    (call,) = answer.message.tool_calls
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    stream = roomy_client.chat.completions.create(
        model="tiny", messages=MESSAGES, seed=1, max_tokens=120, stream=True, extra_body=fields
    )
    streamed = ""
    for chunk in stream:
        for delta in chunk.choices[0].delta.tool_calls or []:
            streamed += delta.function.arguments if delta.function else ""
    assert streamed == call.function.arguments
    assert chunk.choices[0].finish_reason == "tool_calls"


@pytest.mark.slow
def test_no_tool_is_called_where_none_may_be(roomy_client: OpenAI) -> None:
    told = chat(roomy_client, tools=[WEATHER], tool_choice="none").usage.prompt_tokens
    assert told == chat(roomy_client).usage.prompt_tokens


# ---- What is refused, ignored and counted


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "me"},
        {"metadata": {"a": "b"}},
        {"store": True},
        {"safety_identifier": "x", "prompt_cache_key": "y"},
        {"priority": -3},
        {"response_format": {"type": "text"}},
        {"modalities": ["text"]},
        {"verbosity": "medium"},
        {"tools": []},
        {"tool_choice": "auto"},
    ],
    ids=str,
)
def test_fields_that_change_nothing_are_taken(
    tiny_client: OpenAI, fields: dict[str, Any]
) -> None:
    answer = chat(tiny_client, **fields)
    assert answer.choices == chat(tiny_client).choices


def test_a_service_tier_is_told_when_it_is_asked_for(tiny_client: OpenAI) -> None:
    assert chat(tiny_client, service_tier="auto").service_tier == "default"


TOOL_CALL = {"id": "1", "type": "function", "function": {"name": "f"}}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "assistant"}]}, "messages[0].content"),
    ({"messages": [{"role": "assistant", "tool_calls": [TOOL_CALL]}]},
     "messages[0].tool_calls[0].function.arguments"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
     "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]},
     "messages[0].content[0].text"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
     "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "file"}]}]},
     "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"n": 10**9}, "n"),
    ({"n": True}, "n"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_completion_tokens": 2**31}, "max_completion_tokens"),
    ({"stop": "x" * 10_000}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": 1}, "stream": True}, "stream_options.include_usage"),
    ({"stream_options": {"include_obfuscation": True}, "stream": True},
     "stream_options.include_obfuscation"),
    ({"messages": [{"role": "assistant", "content": "", "function_call": {"name": "f"}}]},
     "messages[0].function_call"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"tools": [WEATHER] * 129}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": "some", "tools": [WEATHER]}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}, "tools": [WEATHER]},
     "tool_choice"),
    ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}},
      "tools": [WEATHER]}, "tool_choice"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
    ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs.enable_thinking"),
    ({"reasoning_effort": "low"}, "reasoning_effort"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
    ({"debug_config": {"ignore_eos": True}}, "debug_config"),
    ({"allowed_token_ids": [1] * (2**18 + 1)}, "allowed_token_ids"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"priority": 2**31}, "priority"),
    ({"metadata": {"a": 1}}, "metadata"),
    *(({field: "unheard of"}, field) for field in UNSUPPORTED),
]  # fmt: skip


@pytest.mark.parametrize("fields, param", REFUSED, ids=lambda v: str(v)[:50])
def test_a_chat_that_cannot_be_is_refused_by_the_field(
    tiny_server: RunningServer, fields: dict[str, Any], param: str
) -> None:
    status, error = post(tiny_server, "/v1/chat/completions", {"messages": MESSAGES, **fields})
    assert status == 400
    assert error["param"] is not None and error["param"].startswith(param)
    assert error["code"] and error["message"] and error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"best_of": 0}, "best_of"),
        ({"prompt": [[9] * 400] * 128, "prompt_logprobs": 20}, "prompt_logprobs"),
        ({"logprobs": 6}, "logprobs"),
        ({"suffix": "x"}, "suffix"),
        ({"prompt": ["a"] * 128, "n": 128}, "n"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"echo": "yes"}, "echo"),
        ({"logit_bias": {"9999": 1}}, "logit_bias"),
        ({"stop_token_ids": [9999]}, "stop_token_ids"),
        ({"allowed_token_ids": [9999]}, "allowed_token_ids"),
    ],
    ids=str,
)
def test_a_completion_that_cannot_be_is_refused_by_the_field(
    tiny_server: RunningServer, fields: dict[str, Any], param: str
) -> None:
    status, error = post(tiny_server, "/v1/completions", {"prompt": "a", **fields})
    assert (status, error["param"]) == (400, param)
    assert error["code"]


VLLM = """top_k min_p repetition_penalty min_tokens ignore_eos stop_token_ids priority cache_salt
    include_stop_str_in_output skip_special_tokens prompt_logprobs return_tokens_as_token_ids
    return_token_ids structured_outputs guided_json guided_regex guided_choice guided_grammar
    truncate_prompt_tokens""".split()
VLLM_CHAT = "add_generation_prompt continue_final_message chat_template_kwargs".split()


@pytest.mark.parametrize(
    "documented, taken",
    [
        (chat_create_params.CompletionCreateParamsStreaming, ChatCompletionRequest),
        (completion_create_params.CompletionCreateParamsStreaming, CompletionRequest),
        (ChatCompletionStreamOptionsParam, StreamOptions),
        (ChatCompletionUserMessageParam, Message),
        (ChatCompletionAssistantMessageParam, Message),
        (ChatCompletionToolMessageParam, Message),
        (ChatCompletionContentPartTextParam, ContentPart),
    ],
)
def test_every_field_that_openai_documents_is_known(documented: Any, taken: Any) -> None:
    assert set(typing.get_type_hints(documented)) <= {*taken.__struct_fields__, *UNSUPPORTED}


def test_every_further_field_of_vllm_and_mlc_is_taken() -> None:
    assert {*VLLM, "debug_config"} <= set(CompletionRequest.__struct_fields__)
    assert {*VLLM, *VLLM_CHAT, "debug_config"} <= set(ChatCompletionRequest.__struct_fields__)


@pytest.mark.parametrize(
    "n, num_prompts, max_tokens, num_prompt_logprobs, param",
    [
        (2, 513, 1, 0, "n"),
        (128, 1, 40_000, 0, "max_tokens"),
        (1, 128, 40_000, 0, "max_tokens"),
        (1, 128, 1, 2049, "prompt_logprobs"),
    ],
)
def test_94_a_request_has_a_budget_of_choices_and_of_tokens(
    n: int, num_prompts: int, max_tokens: int, num_prompt_logprobs: int, param: str
) -> None:
    with pytest.raises(ApiError) as caught:
        prompts, limits = [[1]] * num_prompts, [max_tokens] * num_prompts
        generate.check_budget(prompts, limits, n, num_prompt_logprobs)
    assert (caught.value.status, caught.value.param) == (400, param)


def post(server: RunningServer, path: str, fields: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    return post_body(server, path, json.dumps({"model": "tiny", **fields}))


def post_body(server: RunningServer, path: str, body: str) -> tuple[int, dict[str, Any]]:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.url}{path}", body.encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, {}
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["error"]


def test_unknown_fields_are_ignored_and_counted(
    tiny_server: RunningServer, tiny_client: OpenAI
) -> None:
    name = "llmsrv:unknown_fields_total"
    before = gauges(tiny_server, KEY)[name]
    complete(tiny_client, frobnicate=1, wibble={"a": [1]})
    assert gauges(tiny_server, KEY)[name] == before + 2


def test_a_strict_server_refuses_unknown_fields() -> None:
    assert check_other_fields(b'{"a": 1, "b": 2, "echo": null}', ["a"], False, UNSUPPORTED) == 1
    with pytest.raises(ApiError) as caught:
        check_other_fields(b'{"a": 1, "b": 2}', ["a"], True)
    assert (caught.value.param, caught.value.code) == ("b", "unknown_parameter")


# ---- Streamed and whole


STOPS = st.lists(st.text("abehlo \u00e9", min_size=1, max_size=3), max_size=4)
SETTINGS = st.fixed_dictionaries(
    {"seed": st.integers(-(2**63), 2**63 - 1), "max_tokens": st.integers(1, 24)},
    optional={
        "temperature": st.floats(0, 2),
        "top_p": st.floats(0.1, 1),
        "top_k": st.integers(1, 50),
        "min_p": st.floats(0, 0.5),
        "typical_p": st.floats(0.1, 1),
        "repetition_penalty": st.floats(0.5, 2),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "n": st.integers(1, 3),
        "stop": STOPS,
        "stop_token_ids": st.lists(st.integers(0, 250), max_size=20),
        "include_stop_str_in_output": st.booleans(),
        "skip_special_tokens": st.booleans(),
        "min_tokens": st.integers(0, 10),
        "ignore_eos": st.booleans(),
        "logprobs": st.integers(0, 3),
        "echo": st.booleans(),
        "logit_bias": st.dictionaries(st.integers(0, 250).map(str), st.floats(-5, 5), max_size=3),
    },
)
LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


@pytest.mark.slow
@given(fields=SETTINGS, prompt=st.lists(st.integers(3, 200), min_size=1, max_size=40))
def test_a_stream_is_the_whole_answer_in_pieces_under_any_settings(
    tiny_client: OpenAI, fields: dict[str, Any], prompt: list[int]
) -> None:
    fields |= {"return_token_ids": True}
    whole = complete(tiny_client, prompt, **fields)
    choices: dict[int, dict[str, Any]] = {}
    usage: Any = None
    options = {"include_usage": True}
    for chunk in complete(tiny_client, prompt, stream=True, stream_options=options, **fields):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            add(choices.setdefault(choice.index, {}), choice)
    for choice in whole.choices:
        wanted: dict[str, Any] = {}
        add(wanted, choice)
        assert choices[choice.index] == wanted
    num_tokens = sum(len(choice.token_ids) for choice in whole.choices)
    for counted in (usage, whole.usage):
        assert counted.prompt_tokens == len(prompt)
        assert counted.completion_tokens == num_tokens
        assert counted.total_tokens == len(prompt) + num_tokens


def add(joined: dict[str, Any], choice: Any) -> None:
    """Puts what is new of a choice behind what there is of it."""
    joined["text"] = joined.get("text", "") + choice.text
    joined["ids"] = joined.get("ids", []) + choice.token_ids
    joined["reason"] = choice.finish_reason or joined.get("reason")
    for name in LISTS if choice.logprobs else ():
        joined[name] = joined.get(name, []) + getattr(choice.logprobs, name)


# ---- The shapes of answers


def test_an_answer_has_every_key_that_openai_s_schema_requires(tiny_client: OpenAI) -> None:
    for fields in ({}, {"logprobs": True, "top_logprobs": 1, "n": 2}):
        answer = chat(tiny_client, **fields).to_dict()
        ChatCompletion.model_validate(answer, strict=True)
        for choice in answer["choices"]:
            assert choice.keys() == {"finish_reason", "index", "message", "logprobs"}
            assert {"role", "content", "refusal"} <= choice["message"].keys()
            assert choice["logprobs"] is None or choice["logprobs"].keys() == {"content", "refusal"}
    completion = complete(tiny_client, logprobs=1).to_dict()
    Completion.model_validate(completion, strict=True)
    assert completion["choices"][0].keys() == {"finish_reason", "index", "logprobs", "text"}


def test_each_chunk_has_every_key_that_openai_s_schema_requires(tiny_client: OpenAI) -> None:
    fields: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    stream = tiny_client.chat.completions.create(model="tiny", messages=MESSAGES, **fields)
    chunks = [chunk.to_dict() for chunk in stream]
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
        assert chunk.keys() == chunks[-1].keys()
        for choice in chunk["choices"]:
            assert choice.keys() == {"delta", "finish_reason", "index", "logprobs"}
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]


# ---- The server's options


@pytest.mark.slow
def test_a_debugged_server_tells_its_figures_and_ignores_the_end(roomy_client: OpenAI) -> None:
    fields = {"logit_bias": {"2": 100}, "stop": "l", "debug_config": {"ignore_eos": True}}
    answer = complete(roomy_client, **fields)
    assert answer.choices[0].finish_reason == "length"
    extra = answer.usage.extra
    assert extra["prompt_tokens"] == answer.usage.prompt_tokens
    assert extra["decode_tokens"] == 7
    assert 0 < extra["ttft_s"] < extra["end_to_end_latency_s"]
    with pytest.raises(openai.BadRequestError) as caught:
        complete(roomy_client, frobnicate=1)
    assert (caught.value.param, caught.value.code) == ("frobnicate", "unknown_parameter")
