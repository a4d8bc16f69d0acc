"""Invalid requests raise the errors of OpenAI's client, on the real model."""

from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.support.real_model import MODEL
from tests.support.real_model import QUESTION

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
    ({"stop": list("abcdefghijklmnopq")}, "stop", "array_above_max_length"),
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
def test_a_prompt_beyond_the_context_is_refused(client: OpenAI, prompt: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length is 8192") as caught:
        client.completions.create(model=MODEL, prompt=prompt)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize("prompt", ["", [], [[]], [[1], 2], [49152], [-1], [1.5], 5], ids=str)
def test_an_invalid_prompt_is_refused(client: OpenAI, prompt: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt=prompt)
    assert caught.value.param is not None and caught.value.param.startswith("prompt")
