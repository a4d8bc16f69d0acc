"""The server through OpenAI's own client, sync and async, on the real model."""

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from openai import OpenAI

from tests.support.parameters import slow_but
from tests.support.server import RunningServer

MODEL = "SmolLM2-135M-Instruct"
QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."
GOLDEN = json.loads(
    (Path(__file__).parents[2] / "data/golden/smollm2-135m-instruct-q4_1.json").read_text()
)["cases"]

# Settings under which streamed and whole answers must agree; seeded, so that they repeat.
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0, "max_tokens": 9},
    {"temperature": 0, "max_tokens": 3},
    {"temperature": 0.8, "seed": 7, "max_tokens": 4},
    {"temperature": 1.2, "top_p": 0.7, "seed": -5, "max_tokens": 4},
    {"temperature": 0, "stop": " France", "max_tokens": 5},
    {"temperature": 0, "stop": ["zebra", "Par"], "max_tokens": 8},
    {"temperature": 0.9, "seed": 1, "n": 3, "max_tokens": 3},
    {"temperature": 1.0, "seed": 2, "max_tokens": 4, "extra_body": {"top_k": 5, "min_p": 0.1}},
]
FEW = [SETTINGS[i] for i in (2, 4, 6)]  # in every run: a draw, a stop string, several choices


def chat(client: OpenAI, **settings: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=QUESTION, **settings)


def counts(usage: Any) -> tuple[int, int, int]:
    """Usage without what was found in the prefix cache, which is more the second time."""
    return usage.prompt_tokens, usage.completion_tokens, usage.total_tokens


@pytest.mark.parametrize(
    "backend", ["client", pytest.param("reference_client", marks=pytest.mark.slow)]
)
def test_the_real_model_knows_the_capital_of_france(
    backend: str, request: pytest.FixtureRequest
) -> None:
    answer = chat(request.getfixturevalue(backend), temperature=0)
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == MODEL
    assert answer.id.startswith("chatcmpl-")
    assert answer.usage.prompt_tokens == len(GOLDEN[0]["prompt_ids"])
    assert answer.usage.completion_tokens == len(GOLDEN[0]["greedy_ids"])
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@pytest.mark.parametrize("settings", slow_but(SETTINGS, *FEW), ids=str)
def test_a_streamed_chat_is_the_whole_one_in_pieces(
    client: OpenAI, settings: dict[str, Any]
) -> None:
    whole = chat(client, **settings)
    texts = [""] * len(whole.choices)
    reasons: list[str | None] = [None] * len(whole.choices)
    usage = None
    for chunk in chat(client, stream=True, stream_options={"include_usage": True}, **settings):
        assert chunk.object == "chat.completion.chunk"
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert counts(usage) == counts(whole.usage)


@pytest.mark.parametrize("settings", slow_but(SETTINGS, FEW[1]), ids=str)
def test_a_streamed_completion_is_the_whole_one_in_pieces(
    client: OpenAI, settings: dict[str, Any]
) -> None:
    prompt = "The capital of"
    whole = client.completions.create(model=MODEL, prompt=prompt, **settings)
    texts = [""] * len(whole.choices)
    usage = None
    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    for chunk in client.completions.create(model=MODEL, prompt=prompt, **options, **settings):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    assert counts(usage) == counts(whole.usage)


def test_a_prompt_asked_again_is_found_in_the_prefix_cache(client: OpenAI) -> None:
    def ask() -> Any:
        messages: list[Any] = [{"role": "user", "content": "Say " + "very " * 20 + "little."}]
        return client.chat.completions.create(
            model=MODEL, messages=messages, temperature=0, max_tokens=4
        )

    first, second = ask(), ask()
    assert second.choices == first.choices
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert second.usage.prompt_tokens - 17 <= cached < second.usage.prompt_tokens


def test_a_stop_string_is_cut_at_its_first_character_and_counted_to_its_last(
    client: OpenAI,
) -> None:
    answer = chat(client, temperature=0, stop=["tal of Fr"])
    assert answer.choices[0].message.content == "The capi"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 4  # The, capital, of, France


def test_a_seed_repeats_and_another_seed_does_not(client: OpenAI) -> None:
    def say(seed: int) -> str:
        answer = chat(client, temperature=1.5, seed=seed, max_tokens=6)
        assert answer.system_fingerprint.startswith("fp_")
        return str(answer.choices[0].message.content)

    first = say(1)
    assert say(1) == first
    assert say(2) != first


@pytest.mark.parametrize(
    "backend, num_top, tolerance",
    [("client", 5, 0.02), pytest.param("reference_client", 10, 2e-3, marks=pytest.mark.slow)],
)
def test_chat_logprobs_are_the_golden_ones(
    backend: str, num_top: int, tolerance: float, request: pytest.FixtureRequest
) -> None:
    client = request.getfixturevalue(backend)
    answer = chat(client, temperature=0, logprobs=True, top_logprobs=num_top)
    content = answer.choices[0].logprobs.content
    golden = GOLDEN[0]
    assert "".join(token.token for token in content) == ANSWER
    for step, token in enumerate(content):  # the end token has no text and no entry
        wanted = golden["top10_logprobs"][step][:num_top]
        assert token.logprob == pytest.approx(wanted[0][1], abs=tolerance)
        assert [top.token for top in token.top_logprobs] == golden["top10_text"][step][:num_top]
        assert [top.logprob for top in token.top_logprobs] == pytest.approx(
            [logprob for _, logprob in wanted], abs=tolerance
        )
        assert bytes(token.bytes).decode() == token.token


def test_streamed_logprobs_are_those_of_the_whole_answer(client: OpenAI) -> None:
    settings: dict[str, Any] = dict(temperature=0, logprobs=True, top_logprobs=2, stop=" is")
    whole = chat(client, **settings).choices[0].logprobs.content
    streamed: list[Any] = []
    for chunk in chat(client, stream=True, **settings):
        if chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content
    assert streamed == whole
    assert "".join(token.token for token in whole) == "The capital of France"


def test_completion_logprobs_have_offsets_into_the_text(client: OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL,
        prompt="The quick brown fox jumps over",
        temperature=0,
        logprobs=3,
        max_tokens=5,
    )
    choice = answer.choices[0]
    logprobs = choice.logprobs
    assert logprobs is not None and logprobs.tokens and logprobs.text_offset
    assert "".join(logprobs.tokens) == choice.text
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert choice.text[offset : offset + len(token)] == token
    assert logprobs.token_logprobs is not None and logprobs.top_logprobs is not None
    assert logprobs.token_logprobs[0] == pytest.approx(-0.111994, abs=2e-2)
    assert list(logprobs.top_logprobs[0]) == [" a", " the", " brown"]


@pytest.mark.parametrize(
    "backend", ["client", pytest.param("reference_client", marks=pytest.mark.slow)]
)
def test_a_text_has_the_same_logprobs_as_prompt_and_as_answer(
    backend: str, request: pytest.FixtureRequest
) -> None:
    case = GOLDEN[3]
    num_prompt, answer = len(case["prompt_ids"]), case["greedy_ids"][:8]
    client: OpenAI = request.getfixturevalue(backend)
    echoed = client.completions.create(
        model=MODEL, prompt=case["prompt_ids"] + answer, echo=True, logprobs=5, max_tokens=1
    )
    logprobs = echoed.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None
    told = logprobs.token_logprobs[num_prompt : num_prompt + len(answer)]
    wanted = [case["top10_logprobs"][i][0][1] for i in range(len(answer))]
    assert told == pytest.approx(wanted, abs=2e-2)


def test_a_prompt_of_token_ids_continues_as_the_golden_one(client: OpenAI) -> None:
    case = GOLDEN[3]
    answer = client.completions.create(
        model=MODEL,
        prompt=case["prompt_ids"],
        temperature=0,
        max_tokens=10,
        logprobs=0,
        extra_body={"return_tokens_as_token_ids": True},
    )
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.tokens == [f"token_id:{i}" for i in case["greedy_ids"][:10]]


def test_a_list_of_prompts_gives_a_choice_each_in_order(client: OpenAI) -> None:
    prompts = [GOLDEN[i]["text"] for i in (3, 5, 6)]
    answer = client.completions.create(model=MODEL, prompt=prompts, temperature=0, max_tokens=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice, prompt in zip(answer.choices, prompts, strict=True):
        alone = client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=3)
        assert choice.text == alone.choices[0].text
    assert answer.usage is not None and answer.usage.completion_tokens == 9


def test_the_text_of_special_tokens_in_a_message_stays_text(client: OpenAI) -> None:
    plain = chat(client, temperature=0, max_tokens=1).usage.prompt_tokens
    content = QUESTION[0]["content"] + "<|im_end|>"
    spoofed = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": content}], temperature=0, max_tokens=1
    )
    assert spoofed.usage is not None
    assert spoofed.usage.prompt_tokens > plain + 1  # several ordinary tokens, not the one control


def test_ignore_eos_goes_on_to_the_limit(client: OpenAI) -> None:
    answer = chat(client, temperature=0, max_tokens=10, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 10
    assert answer.choices[0].finish_reason == "length"


def test_a_biased_token_is_chosen_and_a_banned_one_never(client: OpenAI) -> None:
    paris, the = 7042, 504  # " Paris", "The"
    biased = chat(client, temperature=0, max_tokens=3, logit_bias={str(paris): 100})
    assert biased.choices[0].message.content == " Paris Paris Paris"
    banned = chat(client, temperature=0, max_tokens=3, logit_bias={str(the): -100})
    assert not banned.choices[0].message.content.startswith("The")


def test_only_allowed_tokens_are_drawn(client: OpenAI) -> None:
    answer = chat(client, max_tokens=6, extra_body={"allowed_token_ids": [7042]})
    assert answer.choices[0].message.content == " Paris" * 6


def test_penalties_keep_a_model_from_repeating_itself(client: OpenAI) -> None:
    def num_distinct(**settings: Any) -> int:
        answer = client.completions.create(
            model=MODEL,
            prompt="a b a b a b a b",
            temperature=0,
            max_tokens=8,
            logprobs=0,
            **settings,
        )
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None and logprobs.tokens
        return len(set(logprobs.tokens))

    plain = num_distinct()
    assert num_distinct(presence_penalty=2.0) > plain
    assert num_distinct(frequency_penalty=2.0) > plain
    assert num_distinct(extra_body={"repetition_penalty": 1.5}) > plain


def test_a_stop_token_ends_the_answer_without_its_text(client: OpenAI) -> None:
    answer = chat(client, temperature=0, extra_body={"stop_token_ids": [7042]})
    assert answer.choices[0].message.content == "The capital of France is"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 6


def test_neither_end_token_nor_stop_string_ends_an_answer_before_min_tokens(
    client: OpenAI,
) -> None:
    answer = chat(client, temperature=0, max_tokens=12, extra_body={"min_tokens": 12})
    assert answer.choices[0].message.content.startswith(ANSWER)
    assert answer.usage.completion_tokens >= 12
    stopped = chat(client, temperature=0, stop=" capital", extra_body={"min_tokens": 5})
    assert stopped.choices[0].message.content.startswith("The capital of France is")


def test_models_are_listed_and_retrieved(client: OpenAI) -> None:
    models = client.models.list().data
    assert [model.id for model in models] == [MODEL]
    model = client.models.retrieve(MODEL)
    assert model == models[0]
    assert model.owned_by == "llmsrv"


@pytest.mark.parametrize("count", [3, pytest.param(8, marks=pytest.mark.slow)])
def test_the_async_client_streams_many_at_once_each_its_own_answer(
    server: RunningServer, count: int
) -> None:
    async def text(client: AsyncOpenAI, case: dict[str, Any]) -> str:
        stream = await client.completions.create(
            model=MODEL, prompt=case["prompt_ids"], temperature=0, max_tokens=8, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_texts() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(text(client, case) for case in GOLDEN[:count]))

    for case, got in zip(GOLDEN, asyncio.run(all_texts())):
        assert case["greedy_text"].replace("<|im_end|>", "").startswith(got)
        assert got


def test_the_async_client_gets_what_the_sync_one_gets(
    client: OpenAI, server: RunningServer
) -> None:
    settings: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 3}
    prompt = "The quick brown fox"

    async def ask() -> tuple[Any, Any, str, Any, list[str], str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as other:
            chat = await other.chat.completions.create(
                messages=QUESTION, logprobs=True, top_logprobs=2, **settings
            )
            completion = await other.completions.create(prompt=prompt, logprobs=2, **settings)
            stream = await other.chat.completions.create(
                messages=QUESTION, stream=True, stream_options={"include_usage": True}, **settings
            )
            text, usage = "", None
            async for chunk in stream:
                usage = chunk.usage or usage
                text += "".join(choice.delta.content or "" for choice in chunk.choices)
            models = [model.id async for model in other.models.list()]
            with pytest.raises(openai.NotFoundError) as caught:
                await other.models.retrieve("gpt-5")
            return chat, completion, text, usage, models, str(caught.value.code)

    chat_answer, completion, text, usage, models, code = asyncio.run(ask())
    wanted = chat(client, temperature=0, max_tokens=3, logprobs=True, top_logprobs=2)
    assert chat_answer.choices == wanted.choices
    assert text == wanted.choices[0].message.content and counts(usage) == counts(wanted.usage)
    wanted_completion = client.completions.create(prompt=prompt, logprobs=2, **settings)
    assert completion.choices == wanted_completion.choices
    assert models == [MODEL]
    assert code == "model_not_found"


# Fields of a chat request -> the field and code of the error.
BAD_FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": "hot"}, "temperature", "invalid_type"),
    ({"temperature": 3}, "temperature", "decimal_above_max_value"),
    ({"top_p": -1}, "top_p", "decimal_below_min_value"),
    ({"n": 0}, "n", "integer_below_min_value"),
    ({"n": 129}, "n", "integer_above_max_value"),
    ({"max_tokens": 0}, "max_tokens", "integer_below_min_value"),
    ({"max_tokens": 1.5}, "max_tokens", "invalid_type"),
    ({"max_tokens": 8192}, "messages", "context_length_exceeded"),
    ({"stop": ""}, "stop", "string_below_min_length"),
    ({"stop": list("abcde")}, "stop", "array_above_max_length"),
    ({"messages": []}, "messages", "array_below_min_length"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
    ({"messages": [{"role": "boss", "content": ""}]}, "messages[0].role", "invalid_value"),
    ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "integer_above_max_value"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ({"seed": 2**63}, "seed", "integer_above_max_value"),
    ({"logit_bias": {"1": 500}}, "logit_bias", "decimal_above_max_value"),
    ({"logit_bias": {"one": 5}}, "logit_bias", "invalid_type"),
    ({"logit_bias": {"49152": 5}}, "logit_bias", "invalid_value"),
    ({"presence_penalty": 2.5}, "presence_penalty", "decimal_above_max_value"),
    ({"frequency_penalty": -2.5}, "frequency_penalty", "decimal_below_min_value"),
    ({"extra_body": {"stop_token_ids": [49152]}}, "stop_token_ids", "invalid_value"),
    ({"extra_body": {"allowed_token_ids": []}}, "allowed_token_ids", "array_below_min_length"),
    ({"tools": [{"type": "function"}]}, "tools[0].function", "missing_required_parameter"),
    ({"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
]


@pytest.mark.parametrize("fields, param, code", BAD_FIELDS, ids=lambda v: str(v)[:40])
def test_a_bad_field_is_a_bad_request_with_param_and_code(
    client: OpenAI, fields: dict[str, Any], param: str, code: str
) -> None:
    request = {"model": MODEL, "messages": QUESTION, **fields}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**request)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id


def test_an_unknown_model_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-5", messages=QUESTION)
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")


@pytest.mark.parametrize("prompt", ["word " * 9000, [1] * 9000], ids=["text", "ids"])
def test_a_prompt_beyond_the_context_is_refused_by_number(client: OpenAI, prompt: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length is 8192") as caught:
        client.completions.create(model=MODEL, prompt=prompt)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize("prompt", ["", [], [[]], [[1], 2], [49152], [-1], [1.5], 5], ids=str)
def test_a_prompt_that_is_none_is_refused(client: OpenAI, prompt: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt=prompt)
    assert caught.value.param is not None and caught.value.param.startswith("prompt")
