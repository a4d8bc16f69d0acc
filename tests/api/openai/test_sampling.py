"""Stop conditions and sampling parameters, on the real model."""

from typing import Any

import pytest
from openai import OpenAI

from tests.support.real_model import ANSWER
from tests.support.real_model import MODEL
from tests.support.real_model import chat


def test_a_stop_string_is_cut_at_its_first_character_and_counted_to_its_last(
    client: OpenAI,
) -> None:
    answer = chat(client, temperature=0, stop=["tal of Fr"])
    assert answer.choices[0].message.content == "The capi"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 4  # The, capital, of, France


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


def test_ignore_eos_generates_up_to_the_limit(client: OpenAI) -> None:
    answer = chat(client, temperature=0, max_tokens=10, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 10
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    "fields, num_tokens",
    [
        ({"max_pattern_size": 3, "min_count": 5}, 5),
        ({"max_pattern_size": 3, "min_pattern_size": 2, "min_count": 5}, 10),
        ({"max_pattern_size": 0, "min_count": 5}, 12),
    ],
)
def test_an_answer_that_repeats_itself_ends_if_that_is_asked_for(
    client: OpenAI, fields: dict[str, int], num_tokens: int, is_stream: bool
) -> None:
    paris = 7042
    answer = chat(
        client,
        temperature=0,
        max_tokens=12,
        logit_bias={str(paris): 100},
        extra_body={"repetition_detection": fields},
        stream=is_stream,
    )
    if is_stream:
        choices = [chunk.choices[0] for chunk in answer]
        text = "".join(choice.delta.content or "" for choice in choices)
        reason = choices[-1].finish_reason
    else:
        text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert (text, reason) == (" Paris" * num_tokens, "length")


def test_a_seed_repeats_an_answer_and_another_seed_does_not(client: OpenAI) -> None:
    def say(seed: int) -> str:
        answer = chat(client, temperature=1.5, seed=seed, max_tokens=6)
        assert answer.system_fingerprint.startswith("fp_")
        return str(answer.choices[0].message.content)

    first = say(1)
    assert say(1) == first
    assert say(2) != first


def test_a_biased_token_is_chosen_and_a_banned_one_never(client: OpenAI) -> None:
    paris, the = 7042, 504  # " Paris", "The"
    biased = chat(client, temperature=0, max_tokens=3, logit_bias={str(paris): 100})
    assert biased.choices[0].message.content == " Paris Paris Paris"
    banned = chat(client, temperature=0, max_tokens=3, logit_bias={str(the): -100})
    assert not banned.choices[0].message.content.startswith("The")


def test_only_allowed_tokens_are_sampled(client: OpenAI) -> None:
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
