"""Which request fields are refused, ignored and counted."""

import json
import typing
from typing import Any

import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletionAssistantMessageParam
from openai.types.chat import ChatCompletionContentPartTextParam
from openai.types.chat import ChatCompletionStreamOptionsParam
from openai.types.chat import ChatCompletionToolMessageParam
from openai.types.chat import ChatCompletionUserMessageParam

from bench.fields import fields_of_class
from bench.fields import openai_fields
from bench.fields import unknown_fields
from llmsrv.api.decode import check_other_fields
from llmsrv.api.generation.submit import check_budget
from llmsrv.api.openai.schema import ContentPart
from llmsrv.api.openai.schema import IGNORED
from llmsrv.api.openai.schema import Message
from llmsrv.api.openai.schema import StreamOptions
from llmsrv.api.openai.schema import UNSUPPORTED
from llmsrv.errors import ApiError
from tests.support.server import RunningServer
from tests.support.server import gauges
from tests.support.servers import KEY
from tests.support.tiny_requests import MESSAGES
from tests.support.tiny_requests import WEATHER
from tests.support.tiny_requests import chat
from tests.support.tiny_requests import complete
from tests.support.tiny_requests import post


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "me"},
        {"metadata": {"a": "b"}},
        {"store": True},
        {"safety_identifier": "x", "prompt_cache_key": "y"},
        {"priority": -3},
        {"repetition_detection": {}},
        {"response_format": {"type": "text"}},
        {"modalities": ["text"]},
        {"verbosity": "medium"},
        {"tools": []},
        {"tool_choice": "auto"},
        {"chat_template_kwargs": {"enable_thinking": True, "unheard of": 1}},
        {"grammar": "", "json_schema": None},
        {"session_id": "me", "stream_interval": 10, "guided_decoding_backend": "xgrammar"},
        {"detokenize": True, "thinking_token_budget": -1, "include_reasoning": True},
        {"stop": [f"never {i}" for i in range(16)]},
    ],
    ids=str,
)
def test_fields_that_change_nothing_are_accepted(
    tiny_client: OpenAI, fields: dict[str, Any]
) -> None:
    answer = chat(tiny_client, **fields)
    assert answer.choices == chat(tiny_client).choices


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
    ({"chat_template_kwargs": {"thinking": [1]}}, "chat_template_kwargs.thinking"),
    ({"reasoning_effort": "low"}, "reasoning_effort"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
    ({"debug_config": {"ignore_eos": True}}, "debug_config"),
    ({"allowed_token_ids": [1] * (2**18 + 1)}, "allowed_token_ids"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"repetition_detection": {"max_pattern_size": 4}}, "repetition_detection"),
    ({"repetition_detection": {"max_pattern_size": 4, "min_count": 1}}, "repetition_detection"),
    ({"repetition_detection": {"max_pattern_size": 4, "min_pattern_size": 5, "min_count": 2}},
     "repetition_detection"),
    ({"repetition_detection": {"max_pattern_size": 1025, "min_count": 2}},
     "repetition_detection.max_pattern_size"),
    ({"repetition_detection": 3}, "repetition_detection"),
    ({"priority": 2**31}, "priority"),
    ({"metadata": {"a": 1}}, "metadata"),
    *(({field: "unheard of"}, field) for field in ("audio", "logprob_token_ids", "prompt_embeds",
      "thinking_token_budget")),
    ({"detokenize": False}, "detokenize"),
    ({"add_special_tokens": True}, "add_special_tokens"),
    ({"truncation_side": "middle"}, "truncation_side"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"request_id": "x" * 257}, "request_id"),
    ({"grammar": "root ::= (", "max_tokens": 4}, "grammar"),
    ({"json_schema": 7}, "json_schema"),
    ({"grammar": 'root ::= "a"', "json_schema": {"type": "object"}}, "json_schema"),
]  # fmt: skip


@pytest.mark.parametrize("fields, param", REFUSED, ids=lambda v: str(v)[:50])
def test_an_invalid_chat_is_refused_naming_the_field(
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
def test_an_invalid_completion_is_refused_naming_the_field(
    tiny_server: RunningServer, fields: dict[str, Any], param: str
) -> None:
    status, error = post(tiny_server, "/v1/completions", {"prompt": "a", **fields})
    assert (status, error["param"]) == (400, param)
    assert error["code"]


@pytest.mark.parametrize(
    "n, num_prompts, max_tokens, num_prompt_logprobs, param",
    [
        (2, 513, 1, 0, "n"),
        (128, 1, 40_000, 0, "max_tokens"),
        (1, 128, 40_000, 0, "max_tokens"),
        (1, 128, 1, 2049, "prompt_logprobs"),
    ],
)
def test_a_request_has_a_budget_of_choices_and_of_tokens(
    n: int, num_prompts: int, max_tokens: int, num_prompt_logprobs: int, param: str
) -> None:
    with pytest.raises(ApiError) as caught:
        prompts, limits = [[1]] * num_prompts, [max_tokens] * num_prompts
        check_budget(prompts, limits, n, num_prompt_logprobs)
    assert (caught.value.status, caught.value.param) == (400, param)


# ---- Fields that are known and unknown

# Of vLLM 0.33, as `python -m bench.fields` reads them from its source.
VLLM = """add_special_tokens allowed_token_ids bad_words cache_salt ec_transfer_params echo
    frequency_penalty ignore_eos include_stop_str_in_output kv_transfer_params length_penalty
    logit_bias logprob_token_ids logprobs max_tokens min_p min_tokens mm_payload model n
    presence_penalty priority prompt_logprobs repetition_detection repetition_penalty request_id
    response_format return_mm_kwargs return_token_ids return_token_offsets
    return_tokens_as_token_ids routed_experts_prompt_start seed session_id skip_special_tokens
    spaces_between_special_tokens stop stop_token_ids stream stream_interval stream_options
    structured_outputs temperature thinking_token_budget top_k top_p truncate_prompt_tokens
    truncation_side use_beam_search user vllm_xargs watermarking""".split()
VLLM_CHAT = """add_generation_prompt chat_template chat_template_kwargs continue_final_message
    documents include_reasoning max_completion_tokens media_io_kwargs messages mm_processor_kwargs
    parallel_tool_calls reasoning_effort return_prompt_text tool_choice tools
    top_logprobs""".split()
VLLM_COMPLETIONS = ["prompt", "prompt_embeds", "suffix"]
# Of earlier releases, and of llama-server and MLC
OTHERS = """best_of detokenize early_stopping guided_choice guided_decoding_backend guided_grammar
    guided_json guided_regex guided_whitespace_pattern logits_processors grammar json_schema
    debug_config""".split()


@pytest.mark.parametrize(
    "request_type, fields",
    [
        ("ChatCompletionRequest", {*VLLM, *VLLM_CHAT, *OTHERS}),
        ("CompletionRequest", {*VLLM, *VLLM_COMPLETIONS, *OTHERS}),
    ],
)
def test_no_field_of_vllm_or_openai_is_unknown(request_type: str, fields: set[str]) -> None:
    assert unknown_fields(request_type, fields) == set()
    assert unknown_fields(request_type, openai_fields(request_type)) == set()
    assert unknown_fields(request_type, {"wibble", "seed"}) == {"wibble"}


def test_the_fields_of_a_request_type_are_read_from_its_source() -> None:
    source = "class A(B):\n    x: int = 0\n    _y: int\n    z = 1\nclass C:\n    w: int\n"
    assert fields_of_class(source, "A") == {"x"}


@pytest.mark.parametrize(
    "documented, accepted",
    [
        (ChatCompletionStreamOptionsParam, StreamOptions),
        (ChatCompletionUserMessageParam, Message),
        (ChatCompletionAssistantMessageParam, Message),
        (ChatCompletionToolMessageParam, Message),
        (ChatCompletionContentPartTextParam, ContentPart),
    ],
)
def test_every_field_that_openai_documents_is_known(documented: Any, accepted: Any) -> None:
    assert set(typing.get_type_hints(documented)) <= set(accepted.__struct_fields__)


@pytest.mark.parametrize("field, values", UNSUPPORTED.items(), ids=list(UNSUPPORTED))
def test_an_unsupported_field_is_accepted_only_if_it_changes_nothing(
    field: str, values: tuple[Any, ...]
) -> None:
    def check(value: Any) -> None:
        check_other_fields(json.dumps({field: value}).encode(), [], True, UNSUPPORTED)

    for value in (None, *values):
        check(value)
    for value in (7, "unheard of", ["a"], {"a": 1}):
        with pytest.raises(ApiError) as caught:
            check(value)
        assert (caught.value.param, caught.value.code) == (field, "unsupported_parameter")


def test_unknown_and_ignored_fields_are_counted(
    tiny_server: RunningServer, tiny_client: OpenAI
) -> None:
    name = "llmsrv:unknown_fields_total"
    before = gauges(tiny_server, KEY)[name]
    complete(tiny_client, frobnicate=1, wibble={"a": [1]})
    assert gauges(tiny_server, KEY)[name] == before + 2
    prediction = {"type": "content", "content": "hello"}
    assert chat(tiny_client, prediction=prediction).choices == chat(tiny_client).choices
    assert gauges(tiny_server, KEY)[name] == before + 3


def test_a_strict_server_refuses_unknown_fields() -> None:
    body = b'{"a": 1, "b": 2, "documents": null, "prediction": {}}'
    assert check_other_fields(body, ["a"], False, UNSUPPORTED, IGNORED) == 2
    with pytest.raises(ApiError) as caught:
        check_other_fields(body, ["a"], True, UNSUPPORTED, IGNORED)
    assert (caught.value.param, caught.value.code) == ("b", "unknown_parameter")
    assert check_other_fields(b'{"prediction": {}}', [], True, UNSUPPORTED, IGNORED) == 1
