"""The server through OpenAI's own client, sync and async, on the real model."""

import asyncio
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from openai import OpenAI

from tests.support.parameters import slow_but
from tests.support.real_model import ANSWER
from tests.support.real_model import GOLDEN
from tests.support.real_model import MODEL
from tests.support.real_model import QUESTION
from tests.support.real_model import chat
from tests.support.server import RunningServer

# Streamed and whole answers must agree under these settings; seeds make them repeatable.
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


def counts(usage: Any) -> tuple[int, int, int]:
    """Usage without the cached tokens, which are more the second time."""
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


def test_a_repeated_prompt_is_found_in_the_prefix_cache(client: OpenAI) -> None:
    def ask() -> Any:
        messages: list[Any] = [{"role": "user", "content": "Say " + "very " * 20 + "little."}]
        return client.chat.completions.create(
            model=MODEL, messages=messages, temperature=0, max_tokens=4
        )

    first, second = ask(), ask()
    assert second.choices == first.choices
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert second.usage.prompt_tokens - 17 <= cached < second.usage.prompt_tokens


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


def test_a_list_of_prompts_returns_one_choice_per_prompt_in_order(client: OpenAI) -> None:
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
