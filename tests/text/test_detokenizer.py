"""llmsrv.text.detokenizer: returns only whole characters and loses nothing."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmsrv.files.gguf import open_gguf
from llmsrv.text.detokenizer import Detokenizer
from llmsrv.text.tokenizer import Tokenizer
from llmsrv.text.tokenizer import load_tokenizer
from tests.support.gguf_writer import write_tiny_llama

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
END_OF_TEXT, IM_START, IM_END = 0, 1, 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """Ids 3 to 258 are the bytes 0 to 255."""
    path = tmp_path_factory.mktemp("tiny") / "m.gguf"
    return load_tokenizer(open_gguf(write_tiny_llama(path)))


def byte_ids(data: bytes) -> list[int]:
    return [3 + byte for byte in data]


def test_half_a_character_is_held_back(tokenizer):
    detokenizer = Detokenizer(tokenizer)
    pushed = [detokenizer.push([id]) for id in byte_ids("é東🙂!".encode())]
    assert pushed == ["", "é", "", "", "東", "", "", "", "🙂", "!"]
    assert detokenizer.flush() == ""


def test_an_unfinished_character_becomes_one_replacement_at_the_end(tokenizer):
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.push(byte_ids(b"a\xe6\x9d")) == "a"
    assert detokenizer.flush() == "\ufffd"


def test_a_character_that_cannot_be_finished_is_replaced_at_once(tokenizer):
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.push(byte_ids(b"\xe6\x9d")) == ""
    assert detokenizer.push(byte_ids(b"a")) == "\ufffda"
    assert detokenizer.push(byte_ids(b"\xff\xc0")) == "\ufffd\ufffd"


def test_special_tokens_are_skipped_or_kept(tokenizer):
    ids = [IM_START, *byte_ids(b"hi"), IM_END, END_OF_TEXT]
    assert Detokenizer(tokenizer).push(ids) == "hi"
    shown = Detokenizer(tokenizer, skip_special_tokens=False)
    assert shown.push(ids) == "<|im_start|>hi<|im_end|><|endoftext|>"


def test_a_skipped_special_token_does_not_break_a_character(tokenizer):
    first, second = byte_ids("é".encode())
    assert Detokenizer(tokenizer).push([first, IM_END, second]) == "é"
    shown = Detokenizer(tokenizer, skip_special_tokens=False)
    assert shown.push([first, IM_END, second]) == "\ufffd<|im_end|>\ufffd"


@given(chunks=st.lists(st.binary(max_size=6) | st.text(max_size=3).map(str.encode), max_size=8))
def test_the_joined_pieces_equal_the_bytes_decoded_once(tokenizer, chunks):
    detokenizer = Detokenizer(tokenizer)
    text = ""
    for chunk in chunks:
        pushed = detokenizer.push(byte_ids(chunk))
        pushed.encode()  # every piece is valid UTF-8
        text += pushed
    assert text + detokenizer.flush() == b"".join(chunks).decode("utf-8", "replace")


def test_characters_stay_whole_however_they_are_cut(tokenizer):
    data = "aé東🙂".encode() + b"\xe6\x9d" + "🙂".encode() + b"\xf0\x9f"
    for first in range(len(data)):
        for second in range(first, len(data)):
            detokenizer = Detokenizer(tokenizer)
            cuts = (data[:first], data[first:second], data[second:])
            text = "".join(detokenizer.push(byte_ids(cut)) for cut in cuts)
            assert text + detokenizer.flush() == data.decode("utf-8", "replace")


def test_golden_text_of_the_default_model(smollm2):
    tokenizer = load_tokenizer(open_gguf(smollm2))
    cases = json.loads((GOLDEN / "smollm2-135m-instruct-q4_1.json").read_text())["cases"]
    for case in cases:
        detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
        text = "".join(detokenizer.push([id]) for id in case["greedy_ids"]) + detokenizer.flush()
        assert text == case["greedy_text"]


def test_a_long_answer_takes_linear_time(tokenizer):
    ids = byte_ids("é".encode()) * 50_000
    detokenizer = Detokenizer(tokenizer)
    start = time.process_time()
    text = "".join(detokenizer.push([id]) for id in ids)
    assert time.process_time() - start < 2
    assert text == "é" * 50_000
