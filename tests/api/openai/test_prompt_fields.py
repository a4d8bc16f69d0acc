"""Request fields about the prompt: echo, log-probabilities, truncation, suffix and cache salt."""

from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.support.gguf_writer import CONTROL
from tests.support.gguf_writer import tiny_vocabulary
from tests.support.gguf_writer import write_tiny_llama
from tests.support.sdk import openai_client
from tests.support.server import run_server
from tests.support.tiny_requests import MESSAGES
from tests.support.tiny_requests import chat
from tests.support.tiny_requests import complete

# ---- The prompt in the answer


def test_echo_puts_the_prompt_before_each_choice(tiny_client: OpenAI) -> None:
    plain = complete(tiny_client, ["hello", "the"], n=2)
    echoed = complete(tiny_client, ["hello", "the"], n=2, echo=True)
    prompts = ["hello", "hello", "the", "the"]
    for choice, other, prompt in zip(echoed.choices, plain.choices, prompts, strict=True):
        assert choice.text == prompt + other.text
    assert echoed.usage.total_tokens == plain.usage.total_tokens


def test_a_nul_character_is_an_ordinary_character(tiny_client: OpenAI) -> None:
    assert complete(tiny_client, "he\0llo", echo=True).choices[0].text.startswith("he\0llo")


def test_echo_with_logprobs_has_every_token_with_its_offset(tiny_client: OpenAI) -> None:
    choice = complete(tiny_client, "hello the", echo=True, logprobs=2, temperature=0).choices[0]
    logprobs = choice.logprobs
    assert logprobs.tokens[:2] == ["hello", " the"]
    assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
    assert all(value < 0 for value in logprobs.token_logprobs[1:])
    assert all(0 < len(top) <= 3 for top in logprobs.top_logprobs[2:])
    assert logprobs.text_offset[:3] == [0, 5, 9]
    assert logprobs.text_offset == sorted(logprobs.text_offset)


def test_prompt_logprobs_equal_those_of_the_echo(tiny_client: OpenAI) -> None:
    prompt = [106, 20, 30, 40]
    echoed = complete(tiny_client, prompt, echo=True, logprobs=3).choices[0].logprobs
    listed = complete(tiny_client, prompt, prompt_logprobs=3).choices[0].prompt_logprobs
    assert listed[0] is None
    for id, tokens, logprob in zip(prompt[1:], listed[1:], echoed.token_logprobs[1:4], strict=True):
        assert tokens[str(id)]["logprob"] == logprob
        own_rank = tokens[str(id)]["rank"]
        assert sorted(token["rank"] for token in tokens.values()) == sorted({1, 2, 3, own_rank})


def test_a_prompt_can_be_scored_without_an_answer(tiny_client: OpenAI) -> None:
    fields: dict[str, Any] = {"echo": True, "logprobs": 1, "temperature": 0}
    scored = complete(tiny_client, "hello the wo", max_tokens=0, **fields)
    choice, longer = scored.choices[0], complete(tiny_client, "hello the wo", **fields).choices[0]
    assert choice.text == "hello the wo" and choice.finish_reason == "length"
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        values = getattr(choice.logprobs, name)
        assert values == getattr(longer.logprobs, name)[:3] and len(values) == 3
    assert scored.usage.completion_tokens == 0 and scored.usage.prompt_tokens == 3
    full = complete(tiny_client, [9] * 512, max_tokens=0, **fields).choices[0]
    assert len(full.logprobs.token_logprobs) == 512


@pytest.mark.parametrize("echo", [False, True])
def test_a_stream_of_no_token_ends(tiny_client: OpenAI, echo: bool) -> None:
    chunks = list(complete(tiny_client, "hello", max_tokens=0, stream=True, n=2, echo=echo))
    assert "".join(chunk.choices[0].text for chunk in chunks) == ("hello" * 2 if echo else "")
    assert [chunk.choices[0].finish_reason for chunk in chunks] == ["length"] * 2


@pytest.mark.parametrize("logprobs", [0, 1, 5])
def test_the_top_always_has_the_sampled_token(tiny_client: OpenAI, logprobs: int) -> None:
    allowed = {"allowed_token_ids": [45], "max_tokens": 3}  # id 45 is "*"
    choice = complete(tiny_client, "hello", logprobs=logprobs, echo=True, **allowed).choices[0]
    tops, own = choice.logprobs.top_logprobs, choice.logprobs.token_logprobs
    assert choice.logprobs.tokens[1:] == ["*"] * 3
    assert [top["*"] for top in tops[1:]] == own[1:]
    assert all(len(top) <= logprobs + 1 for top in tops[1:])


@pytest.mark.parametrize("num_alternatives", [0, 2])
def test_every_token_of_a_prompt_has_its_rank(tiny_client: OpenAI, num_alternatives: int) -> None:
    answer = complete(tiny_client, [9, 30, 40], prompt_logprobs=num_alternatives).choices[0]
    wide = complete(tiny_client, [9, 30, 40], prompt_logprobs=20).choices[0]
    for id, few, many in zip((30, 40), answer.prompt_logprobs[1:], wide.prompt_logprobs[1:]):
        assert few[str(id)] == many[str(id)] and few[str(id)]["rank"] >= 1
        less_likely = [t for t in many.values() if t["logprob"] < many[str(id)]["logprob"]]
        assert all(token["rank"] > many[str(id)]["rank"] for token in less_likely)


def test_a_chat_can_return_the_log_probabilities_and_ids_of_its_prompt(tiny_client: OpenAI) -> None:
    answer = chat(tiny_client, prompt_logprobs=0, return_token_ids=True)
    assert len(answer.prompt_logprobs) == len(answer.prompt_token_ids)
    assert answer.choices[0].logprobs is None


def test_usage_counts_the_token_ids(tiny_client: OpenAI) -> None:
    answer = complete(tiny_client, "hello", n=3, stop=["a", "e"], return_token_ids=True)
    assert sum(len(choice.token_ids) for choice in answer.choices) == answer.usage.completion_tokens
    assert answer.usage.prompt_tokens == len(answer.choices[0].prompt_token_ids)


# ---- The prompt that the model gets


def test_a_prompt_is_truncated_at_its_beginning(tiny_client: OpenAI) -> None:
    answer = complete(
        tiny_client, [9, 8, 7, 6], truncate_prompt_tokens=2, return_token_ids=True
    )
    assert answer.choices[0].prompt_token_ids == [7, 6]
    ids = [*range(10, 18)]
    for side, kept in ((None, ids[4:]), ("left", ids[4:]), ("right", ids[:4])):
        fields = {"truncate_prompt_tokens": 4, "truncation_side": side, "return_token_ids": True}
        assert complete(tiny_client, ids, **fields).choices[0].prompt_token_ids == kept
    most = complete(tiny_client, [9] * 2000, truncate_prompt_tokens=-1)
    assert most.usage.total_tokens == 512
    whole = chat(tiny_client, return_token_ids=True).prompt_token_ids
    cut = chat(tiny_client, return_token_ids=True, truncate_prompt_tokens=5).prompt_token_ids
    assert cut == whole[-5:]


def test_requests_with_different_salts_share_no_prefix(tiny_client: OpenAI) -> None:
    def num_cached(**fields: Any) -> int:
        usage = complete(tiny_client, [77] * 40, max_tokens=1, **fields).usage
        return int(usage.prompt_tokens_details.cached_tokens)

    assert num_cached(cache_salt="one") == 0
    assert num_cached(cache_salt="one") == 39
    assert num_cached(cache_salt="two") == 0


def test_a_vocabulary_without_fill_in_tokens_refuses_a_suffix(tiny_client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(tiny_client, suffix="the end")
    assert caught.value.param == "suffix"


@pytest.mark.slow
def test_a_suffix_is_put_between_the_fill_in_tokens(tmp_path: Path) -> None:
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


def test_an_answer_continues_the_last_message(tiny_client: OpenAI) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "the wo"}]
    answer = chat(tiny_client, messages, continue_final_message=True, return_token_ids=True)
    prompt = complete(tiny_client, answer.prompt_token_ids, echo=True).choices[0].text
    assert prompt.startswith(
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nthe wo"
    )
    with pytest.raises(openai.BadRequestError, match="the assistant's"):
        chat(tiny_client, continue_final_message=True)


@pytest.mark.parametrize("content", ["the wo", [{"type": "text", "text": "the wo"}]])
def test_a_chat_can_repeat_the_message_that_it_continues(tiny_client: OpenAI, content: Any) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": content}]
    fields = {"continue_final_message": True, "echo": True}
    plain = chat(tiny_client, messages, continue_final_message=True).choices[0].message.content
    assert chat(tiny_client, messages, **fields).choices[0].message.content == "the wo" + plain
    chunks = chat(tiny_client, messages, stream=True, n=2, **fields)
    streamed = "".join(c.choices[0].delta.content or "" for c in chunks if not c.choices[0].index)
    assert streamed == "the wo" + plain
    assert chat(tiny_client, echo=True).choices == chat(tiny_client).choices


def test_a_request_id_becomes_part_of_the_id_of_the_answer(tiny_client: OpenAI) -> None:
    assert complete(tiny_client, request_id="my own").id == "cmpl-my own"
    assert chat(tiny_client, request_id="my own").id == "chatcmpl-my own"


@pytest.mark.parametrize("side", ["left", "right"])
def test_only_the_part_of_a_text_that_can_matter_is_tokenized(
    tiny_client: OpenAI, side: str
) -> None:
    text = "".join(f"{i} hello the world\n" for i in range(300_000))
    fields = {"truncate_prompt_tokens": 40, "truncation_side": side, "return_token_ids": True}
    kept = text[:1000] if side == "right" else text[-1000:]
    whole, part = complete(tiny_client, [text, kept], **fields).choices
    assert whole.prompt_token_ids == part.prompt_token_ids


@pytest.mark.parametrize("where", ["messages", "tools"])
def test_a_chat_that_is_longer_than_any_context_is_refused_even_if_truncated(
    tiny_client: OpenAI, where: str
) -> None:
    fields: dict[str, Any] = {"truncate_prompt_tokens": 5}
    messages = MESSAGES * 2
    if where == "tools":
        function = {"name": "f", "description": "d" * 100_000}
        fields["tools"] = [{"type": "function", "function": function}]
    else:
        messages = [{"role": "user", "content": "a" * 50_000}] * 2
    with pytest.raises(openai.BadRequestError) as caught:
        chat(tiny_client, messages, **fields)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", where)
