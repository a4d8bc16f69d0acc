"""Log-probabilities of chats and completions, on the real model."""

from math import exp
from typing import Any

import pytest
from openai import BadRequestError
from openai import OpenAI

from tests.support.real_model import ANSWER
from tests.support.real_model import GOLDEN
from tests.support.real_model import MODEL
from tests.support.real_model import chat
from tests.support.tiny_requests import chat as tiny_chat


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


def test_streamed_logprobs_equal_those_of_the_whole_answer(client: OpenAI) -> None:
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
    echoed_logprobs = logprobs.token_logprobs[num_prompt : num_prompt + len(answer)]
    wanted = [case["top10_logprobs"][i][0][1] for i in range(len(answer))]
    assert echoed_logprobs == pytest.approx(wanted, abs=2e-2)


def test_all_log_probabilities_can_be_asked_for(tiny_client: OpenAI) -> None:
    fields: dict[str, Any] = {"logprobs": True, "top_logprobs": -1, "max_tokens": 2}
    answer = tiny_chat(tiny_client, prompt_logprobs=-1, **fields)
    tops = answer.choices[0].logprobs.content[0].top_logprobs
    values = [top.logprob for top in tops]
    assert sum(map(exp, values)) == pytest.approx(1, abs=1e-3)
    assert values == sorted(values, reverse=True) and len(values) > 200
    for tokens in answer.prompt_logprobs[1:]:
        assert sorted(token["rank"] for token in tokens.values()) == [*range(1, len(values) + 1)]
    streamed = [*tiny_chat(tiny_client, stream=True, **fields)]
    chunks = [c.choices[0].logprobs for c in streamed if c.choices and c.choices[0].logprobs]
    assert chunks[0].content[0].top_logprobs == tops
    with pytest.raises(BadRequestError) as caught:
        tiny_chat(tiny_client, **{**fields, "n": 8, "max_tokens": 400})
    assert caught.value.param == "top_logprobs"
