"""Tokenizers of Hugging Face folders give the same ids as the tokenizers library."""

import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from llmsrv.files.folder import open_folder
from llmsrv.text.chat_template import ChatTemplate
from llmsrv.text.tokenizer import Tokenizer
from llmsrv.text.tokenizer import load_tokenizer
from tests.support.parameters import slow_but
from tests.support.sentencepiece import LETTERS
from tests.support.tokenizer_json import KINDS
from tests.support.tokenizer_json import folder_with
from tests.support.tokenizer_json import llama2
from tests.support.tokenizer_json import mistral_in_a_sequence
from tests.support.tokenizer_json import qwen

FEW = (qwen, llama2, mistral_in_a_sequence)  # in every run
PIECES = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<tool>", "<b>", "\n", " ", "  ", "▁", "the"]


@pytest.fixture(scope="module", params=slow_but(KINDS, *FEW), ids=lambda kind: kind.__name__)
def twins(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    description = request.param()
    path = folder_with(tmp_path_factory.mktemp("twins") / "model", tokenizer=description)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(description))
    return load_tokenizer(open_folder(path)), theirs


@settings(max_examples=40)
@given(
    text=st.lists(
        st.sampled_from(PIECES) | st.text(LETTERS + " 1", max_size=8) | st.text(max_size=3)
    ).map("".join)
)
def test_ids_equal_those_of_the_tokenizers_library(
    twins: tuple[Tokenizer, tokenizers.Tokenizer], text: str
) -> None:
    ours, theirs = twins
    wanted = theirs.encode(text, add_special_tokens=False).ids
    assert ours.encode(text, parse_special=True) == wanted


def test_the_text_of_a_special_token_in_plain_text_is_not_a_token(
    twins: tuple[Tokenizer, tokenizers.Tokenizer],
) -> None:
    ours, _ = twins
    ids = ours.encode("<s>", parse_special=False)
    assert len(ids) > 1 and not any(map(ours.is_special, ids))


@settings(max_examples=25)
@given(text=st.text(LETTERS + " 1<s>\n", max_size=30))
def test_a_message_gets_the_ids_of_its_text(
    twins: tuple[Tokenizer, tokenizers.Tokenizer], text: str
) -> None:
    """Pieces are encoded one by one, but only the first counts as the beginning."""
    ours, theirs = twins
    if any(special in text for special in ours.special_tokens):
        return
    template = ChatTemplate("<s>{{ messages[0].content }}</s>{{ messages[0].content }}", ours)
    wanted = theirs.encode(f"<s>{text}</s>{text}", add_special_tokens=False).ids
    assert template.encode([{"role": "user", "content": text}]) == wanted
