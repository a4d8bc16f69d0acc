"""Request fields about the answer, on a tiny random model, and the shapes of answers."""

from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import OpenAI
from openai.types import Completion
from openai.types.chat import ChatCompletion
from openai.types.chat import ChatCompletionChunk

from tests.support.tiny_requests import MESSAGES
from tests.support.tiny_requests import chat
from tests.support.tiny_requests import complete

# ---- Choices and their text


def test_best_of_returns_the_likeliest_choices_and_counts_all(tiny_client: OpenAI) -> None:
    all_six = complete(tiny_client, n=6, logprobs=0)
    means = [sum(c.logprobs.token_logprobs) / len(c.logprobs.tokens) for c in all_six.choices]
    ranked = sorted(zip(means, all_six.choices), key=lambda pair: -pair[0])
    best = complete(tiny_client, n=2, best_of=6)
    assert [choice.text for choice in best.choices] == [choice.text for _, choice in ranked[:2]]
    assert [choice.index for choice in best.choices] == [0, 1]
    assert best.choices[0].logprobs is None
    assert best.usage.completion_tokens == all_six.usage.completion_tokens


def test_include_stop_str_in_output_keeps_the_stop_string(tiny_client: OpenAI) -> None:
    whole = complete(tiny_client, temperature=0).choices[0].text
    stop = whole[2:4]
    kept = complete(tiny_client, temperature=0, stop=stop, include_stop_str_in_output=True)
    cut = complete(tiny_client, temperature=0, stop=stop)
    assert kept.choices[0].text == whole[: whole.index(stop) + len(stop)]
    assert cut.choices[0].text == whole[: whole.index(stop)]
    assert kept.usage.completion_tokens == cut.usage.completion_tokens


def test_special_tokens_have_text_unless_they_are_skipped(tiny_client: OpenAI) -> None:
    fields = {"logit_bias": {"1": 100}, "max_tokens": 2}
    assert complete(tiny_client, **fields).choices[0].text == ""
    unskipped = complete(tiny_client, **fields, skip_special_tokens=False)
    assert unskipped.choices[0].text == "<|im_start|>" * 2


def test_a_bias_against_every_token_does_not_hang_the_answer(tiny_client: OpenAI) -> None:
    answer = complete(tiny_client, logit_bias={str(id): -100 for id in range(270)})
    assert answer.usage.completion_tokens > 0


def test_continuous_usage_stats_put_usage_in_each_chunk(tiny_client: OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(complete(tiny_client, stream=True, stream_options=options, ignore_eos=True))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts) and counts[0] > 0 and counts[-1] == 8


def test_an_answer_has_a_service_tier_if_the_request_does(tiny_client: OpenAI) -> None:
    assert chat(tiny_client, service_tier="auto").service_tier == "default"


@pytest.mark.slow
def test_enable_debug_adds_figures_and_allows_ignoring_every_end(roomy_client: OpenAI) -> None:
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
    """Appends the new pieces of a choice."""
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
