"""Tokenizers of Hugging Face folders: tokens, details from the other files, and refusals."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from llmsrv.errors import ModelError
from llmsrv.files.folder import open_folder
from llmsrv.text.chat_template import ChatTemplate
from llmsrv.text.defaults import read_chat_template
from llmsrv.text.defaults import sampling_defaults
from llmsrv.text.detokenizer import Detokenizer
from llmsrv.text.tokenizer import Tokenizer
from llmsrv.text.tokenizer import load_tokenizer
from tests.support.tokenizer_json import Json
from tests.support.tokenizer_json import TINY
from tests.support.tokenizer_json import folder_with
from tests.support.tokenizer_json import gemma
from tests.support.tokenizer_json import tiny_json
from tests.support.tokenizer_json import token

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    return lambda **files: folder_with(tmp_path / f"model-{len(os.listdir(tmp_path))}", **files)


# ---- The sixteen tiny models


@pytest.mark.parametrize("name", sorted(os.listdir(TINY)))
def test_every_tiny_folder_loads_and_renders_its_template(name: str) -> None:
    model = open_folder(TINY / name)
    tokenizer = load_tokenizer(model)
    assert tokenizer.vocab_size == 512  # from config.json; tokenizer.json has 500 tokens
    assert tokenizer.end_ids == {1} and tokenizer.bos_id == 0 and not tokenizer.add_bos
    assert tokenizer.special_tokens == {"<s>": 0, "</s>": 1, "<|user|>": 2, "<|assistant|>": 3}
    source = read_chat_template(model)
    assert source is not None
    template = ChatTemplate(source, tokenizer)
    messages = [{"role": "user", "content": "hello </s>"}]
    assert template.render(messages) == "<s><|user|>hello </s></s><|assistant|>"
    ids = template.encode(messages)
    assert ids[:2] == [0, 2] and ids[-2:] == [1, 3] and ids.count(1) == 1


def test_ids_without_a_token_decode_to_nothing() -> None:
    tokenizer = load_tokenizer(open_folder(TINY / "llama"))
    assert [tokenizer.token_bytes(id) for id in range(500, 512)] == [b""] * 12
    assert Detokenizer(tokenizer).push([511, *tokenizer.encode("a", parse_special=False)]) == "a"
    assert tokenizer.encode("", parse_special=True) == []


# ---- Tokens


@pytest.mark.parametrize("text", ["<|end_of_turn|>", "<｜User｜>"])
def test_a_token_that_looks_like_a_control_token_is_one(write: Write, text: str) -> None:
    description = tiny_json()
    description["added_tokens"] += [token(text, 500, special=False), token("", 501)]
    tokenizer = load_tokenizer(open_folder(write(tokenizer=description)))
    assert tokenizer.encode(text, parse_special=True) == [500] and tokenizer.is_special(500)
    assert 500 not in tokenizer.encode(text, parse_special=False)
    template = ChatTemplate("{{ messages[0].content }}", tokenizer)
    assert 500 not in template.encode([{"role": "user", "content": text}])


def test_spaces_and_bytes_are_decoded(write: Write) -> None:
    tokenizer = load_tokenizer(open_folder(write(tokenizer=gemma())))
    ids = tokenizer.encode("a 東 🙂<b>", parse_special=True)
    assert Detokenizer(tokenizer).push(ids) == "a 東 🙂<b>"
    assert tokenizer.token_bytes(3 + 0x41) == b"A"


# ---- Details from the other files


def load(path: Path) -> Tokenizer:
    return load_tokenizer(open_folder(path))


def test_named_tokens_are_texts_objects_or_ids(write: Write) -> None:
    named = {"bos_token": {"content": "<|user|>", "lstrip": False}, "eos_token": None}
    tokenizer = load(write(tokenizer_config=named | {"image_token": "</s>", "pad_token": "<none>"}))
    assert tokenizer.bos_id == 2
    assert tokenizer.named_tokens == {
        "bos_token": "<|user|>",
        "eos_token": "</s>",  # config.json and generation_config.json have its id
        "pad_token": "</s>",
        "image_token": "</s>",
    }


@pytest.mark.parametrize(
    ("in_config", "in_generation_config", "in_tokenizer_config", "wanted"),
    [
        (1, 1, "</s>", {1}),
        (1, [1, 3], "</s>", {1, 3}),
        (1, [1, 3], "<|user|>", {1, 2, 3}),
        ([2, 3], None, None, {2, 3}),
        (None, None, None, set()),
        (10**9, [-1, True, "1", 2.0, 3], None, {3}),
    ],
)
def test_every_file_may_name_ids_that_end_an_answer(
    write: Write,
    in_config: object,
    in_generation_config: object,
    in_tokenizer_config: object,
    wanted: set[int],
) -> None:
    config = json.loads((TINY / "llama" / "config.json").read_text())
    path = write(
        config=config | {"eos_token_id": in_config},
        generation_config={"eos_token_id": in_generation_config},
        tokenizer_config={"eos_token": in_tokenizer_config},
    )
    assert load(path).end_ids == wanted


def test_the_config_or_else_the_post_processor_decides_whether_bos_is_added(write: Write) -> None:
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [bos, sequence],
        "pair": [bos, sequence],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    several = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template]}
    named = {"bos_token": "<s>"}
    for processor in (template, several):
        description = tiny_json(post_processor=processor)
        assert load(write(tokenizer=description, tokenizer_config=named)).add_bos
        silent = write(tokenizer=description, tokenizer_config=named | {"add_bos_token": False})
        assert not load(silent).add_bos
        other = write(tokenizer=description, tokenizer_config={"bos_token": "</s>"})
        assert not load(other).add_bos
    assert load(write(tokenizer_config=named | {"add_bos_token": True})).add_bos
    assert not load(write(tokenizer_config=named)).add_bos


def test_the_vocabulary_is_as_large_as_its_largest_id(write: Write) -> None:
    description = tiny_json()
    description["added_tokens"].append(token("<far>", 700))
    tokenizer = load(write(tokenizer=description))
    assert tokenizer.vocab_size == 701
    assert tokenizer.encode("<far>", parse_special=True) == [700]
    assert tokenizer.token_bytes(650) == b""


def test_one_of_several_named_templates_is_the_default(write: Write) -> None:
    templates = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    path = write(tokenizer_config={"chat_template": templates})
    (path / "chat_template.jinja").unlink()
    assert read_chat_template(open_folder(path)) == "b"


def test_invalid_sampling_defaults_are_ignored_with_a_warning(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    recommended = {"temperature": 0.7, "top_k": 20, "top_p": 1, "repetition_penalty": 1.1}
    assert sampling_defaults(open_folder(write(generation_config=recommended))) == recommended
    sampled = recommended | {"do_sample": True, "min_p": 0.05}
    assert sampling_defaults(open_folder(write(generation_config=sampled)))["min_p"] == 0.05
    greedy = recommended | {"do_sample": False}
    assert sampling_defaults(open_folder(write(generation_config=greedy))) == {}
    assert not caplog.text
    odd = {"temperature": "hot", "top_k": 1.5, "top_p": 1.5, "min_p": True, "eta": 1}
    assert sampling_defaults(open_folder(write(generation_config=odd))) == {}
    for name in ("temperature 'hot'", "top_k 1.5", "top_p 1.5", "min_p True"):
        assert f"ignoring the invalid recommendation {name}" in caplog.text


# ---- Refusals


def without(description: Json, key: str) -> Json:
    return {name: value for name, value in description.items() if name != key}


def bpe(vocab: Json, *merges: object) -> Json:
    model = {"type": "BPE", "vocab": vocab, "merges": merges}
    return tiny_json(model=model, added_tokens=[])


@pytest.mark.parametrize(
    ("description", "message"),
    [
        (tiny_json(model={"type": "Unigram", "vocab": [["a", 0.0]]}), "has type 'Unigram'"),
        (tiny_json(model={"type": "WordPiece", "vocab": {"a": 0}}), "has type 'WordPiece'"),
        (tiny_json(model={"type": "WordLevel", "vocab": {"a": 0}}), "only BPE is supported"),
        (tiny_json(model={"vocab": {}}), "has type None; only BPE is supported"),
        (tiny_json(model=None), "is not a tokenizer: Expected `object`, got `null`"),
        (without(tiny_json(), "model"), "is not a tokenizer: .*missing required field `model`"),
        (bpe({"a": -1}), "is not a tokenizer: Expected `int` >= 0"),
        (bpe({"a": 2**40}), "is not a tokenizer: Expected `int` <= 4194303"),
        (bpe({"a": "b"}), "is not a tokenizer: Expected `int`, got `str`"),
        (bpe({"a": 0}, ["a"]), r"is not a tokenizer: .* at `\$.merges\[0\]"),
        (bpe({"a": 0}, "a b"), "its vocabulary is not usable: "),
        (bpe({}), "its vocabulary is not usable: it has no tokens"),
        (tiny_json(added_tokens=[{"id": 1}]), "missing required field `content`"),
        (tiny_json(added_tokens=[token("x", 1, single_word=True)]), "'x' matches single words"),
        (tiny_json(pre_tokenizer={"type": "Mystery"}), "its vocabulary is not usable: "),
        (tiny_json(pre_tokenizer=None, decoder={"type": "WordPiece"}), r"has types \['WordPi"),
        ([], "is not a tokenizer: Expected `object`, got `array`"),
    ],
)
def test_refuses_a_tokenizer_it_cannot_use(write: Write, description: Json, message: str) -> None:
    path = write(tokenizer=description)
    with pytest.raises(ModelError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"{}" * 9, b"\xff\xfe", b"[" * 100_000])
def test_refuses_files_that_are_not_json(write: Write, content: bytes) -> None:
    path = write(tokenizer={})
    (path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelError, match="tokenizer.json: "):
        load(path)


def test_a_folder_without_tokenizer_json_is_refused(write: Write) -> None:
    path = write()
    (path / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="has no tokenizer.json"):
        load(path)
