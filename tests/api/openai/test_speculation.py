"""Speculative decoding does not change answers."""

from typing import Any

import pytest

from tests.support.sdk import openai_client
from tests.support.server import RunningServer
from tests.support.server import gauges
from tests.support.server import run_server

MODEL = "SmolLM2-135M-Instruct"
LINES = "\n".join(f"item {i}: the price is {i * 7} dollars" for i in range(6))
COPY = f"{LINES}\n\n{LINES[:60]}"
REQUESTS: list[dict[str, Any]] = [
    {"prompt": COPY, "max_tokens": 60, "stop": ["item 4", "35"]},
    {"prompt": COPY, "max_tokens": 30, "logprobs": 2},
    {"prompt": COPY, "max_tokens": 20, "temperature": 0.8, "seed": 7, "n": 2},
    {"prompt": COPY, "max_tokens": 20, "frequency_penalty": 0.5, "presence_penalty": 0.2},
]


def answers(server: RunningServer, request: dict[str, Any]) -> list[Any]:
    """Each choice's text, finish reason and log-probabilities; the stream has the same text."""
    client = openai_client(server.url)
    fields = {"model": MODEL, "temperature": 0, **request}
    whole = client.completions.create(**fields)
    texts = [""] * fields.get("n", 1)
    for chunk in client.completions.create(stream=True, **fields):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    assert whole.usage is not None
    return [
        *((each.text, each.finish_reason, each.logprobs) for each in whole.choices),
        whole.usage.completion_tokens,
    ]


@pytest.mark.slow
def test_speculation_changes_nothing_that_a_client_sees(server: RunningServer) -> None:
    with run_server("--speculative-mode", "ngram") as speculating:
        for request in REQUESTS:
            assert answers(speculating, request) == answers(server, request)
        assert gauges(speculating)["vllm:spec_decode_num_accepted_tokens_total"] > 0
