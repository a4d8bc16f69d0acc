"""llmsrv.text.tokenizer and pre_tokenizers: the same ids as other tokenizers, and refusals."""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from llmsrv.errors import ModelError
from llmsrv.files.gguf import open_gguf
from llmsrv.text.pre_tokenizers import PRE_TOKENIZERS
from llmsrv.text.tokenizer import BYTE_OF_CHARACTER
from llmsrv.text.tokenizer import Tokenizer
from llmsrv.text.tokenizer import longest_match_pattern
from llmsrv.text.tokenizer import load_tokenizer
from tests.support.gguf_writer import CONTROL
from tests.support.gguf_writer import NORMAL
from tests.support.gguf_writer import TINY_SPECIALS
from tests.support.gguf_writer import USER_DEFINED
from tests.support.gguf_writer import byte_characters
from tests.support.gguf_writer import tiny_vocabulary
from tests.support.gguf_writer import write_gguf

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
TOKENS = "tokenizer.ggml.tokens"
TYPES = "tokenizer.ggml.token_type"
MERGES = "tokenizer.ggml.merges"


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2) -> Tokenizer:
    return load_tokenizer(open_gguf(smollm2))


@pytest.fixture(scope="module")
def missing_bytes(smollm2_tokenizer) -> set[int]:
    """Bytes without a token in SmolLM2: some control characters, and some that UTF-8 uses never or
    only beyond the common planes."""
    tokens = map(smollm2_tokenizer.token_bytes, range(smollm2_tokenizer.vocab_size))
    return set(range(256)) - {token[0] for token in tokens if len(token) == 1}


@pytest.fixture
def load(tmp_path):
    """Loads the tiny vocabulary with some metadata replaced; None removes a key."""

    def load(**changes: object) -> Tokenizer:
        replaced = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
        metadata = tiny_vocabulary() | replaced
        present = {key: value for key, value in metadata.items() if value is not None}
        return load_tokenizer(open_gguf(write_gguf(tmp_path / "m.gguf", present)))

    return load


def with_more_tokens(**texts: int) -> dict[str, object]:
    """Changes for `load`: more tokens and their types."""
    vocabulary = tiny_vocabulary()
    return {
        "tokens": [*vocabulary[TOKENS], *texts],
        "token_type": [*vocabulary[TYPES], *texts.values()],
    }


# ---- The default model


def test_golden_ids_of_the_default_model(smollm2_tokenizer):
    cases = json.loads((GOLDEN / "tokens-smollm2.json").read_text())["cases"]
    assert len(cases) == 100
    for case in cases:
        assert smollm2_tokenizer.encode(case["text"], parse_special=True) == case["ids"]
        plain = smollm2_tokenizer.encode(case["text"], parse_special=False)
        assert (plain == case["ids"]) == ("<|im_" not in case["text"])


def test_golden_prompt_ids_of_the_default_model(smollm2_tokenizer):
    cases = json.loads((GOLDEN / "smollm2-135m-instruct-q4_1.json").read_text())["cases"]
    for case in cases:
        assert smollm2_tokenizer.encode(case["text"], parse_special=True) == case["prompt_ids"]


def test_facts_of_the_default_model(smollm2_tokenizer):
    tokenizer = smollm2_tokenizer
    assert tokenizer.vocab_size == 49152
    assert tokenizer.bos_id == 1 and not tokenizer.add_bos
    assert tokenizer.end_ids == {0, 2}  # <|endoftext|>, <|im_end|>
    assert tokenizer.special_tokens["<|im_start|>"] == 1
    assert len(tokenizer.special_tokens) == 17
    assert tokenizer.named_tokens["bos_token"] == "<|im_start|>"
    assert tokenizer.named_tokens["eos_token"] == "<|im_end|>"
    assert tokenizer.token_text(19556) == "Hello"
    assert tokenizer.token_text(905) == "Ġworld" and tokenizer.token_bytes(905) == b" world"


def test_the_default_model_loads_in_a_quarter_of_a_second(smollm2):
    file = open_gguf(smollm2)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        load_tokenizer(file)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.25


def test_every_token_of_the_default_model_has_its_bytes(smollm2_tokenizer):
    """Also, no two tokens stand for the same single byte."""
    ids = range(smollm2_tokenizer.vocab_size)
    total = b"".join(map(smollm2_tokenizer.token_bytes, ids))
    assert len(total) > 49152 and set(range(256)) >= set(total)
    singles = [id for id in ids if len(smollm2_tokenizer.token_bytes(id)) == 1]
    assert len({smollm2_tokenizer.token_bytes(id) for id in singles}) == len(singles)


@given(text=st.text())
def test_encoding_and_decoding_returns_the_text(smollm2_tokenizer, missing_bytes, text):
    printed = bytes(byte for byte in text.encode() if byte not in missing_bytes)
    for parse_special in (False, True):
        ids = smollm2_tokenizer.encode(text, parse_special=parse_special)
        assert all(0 <= id < smollm2_tokenizer.vocab_size for id in ids)
        assert b"".join(map(smollm2_tokenizer.token_bytes, ids)) == printed


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["a", " ", "\n", "<", "<|im_start", "1", "é", "ab ", "'"])
def test_long_monotonous_text_takes_linear_time(smollm2_tokenizer, unit):
    text = unit * (200_000 // len(unit))
    start = time.process_time()
    ids = smollm2_tokenizer.encode(text, parse_special=True)
    assert time.process_time() - start < 3
    assert b"".join(map(smollm2_tokenizer.token_bytes, ids)) == text.encode()


def test_several_threads_can_encode_at_once(smollm2_tokenizer):
    cases = json.loads((GOLDEN / "tokens-smollm2.json").read_text())["cases"] * 5
    with ThreadPoolExecutor(4) as pool:
        encoded = pool.map(lambda c: smollm2_tokenizer.encode(c["text"], parse_special=True), cases)
    assert list(encoded) == [case["ids"] for case in cases]


def test_75_other_threads_run_while_a_long_text_is_encoded(smollm2_tokenizer):
    with ThreadPoolExecutor(1) as pool:
        encoded = pool.submit(smollm2_tokenizer.encode, "[] " * 50_000, parse_special=True)
        num_turns = 0
        while not encoded.done():
            num_turns += 1
            time.sleep(0)  # offers the interpreter lock to other threads
    assert num_turns > 20


# ---- Other implementations


@pytest.fixture(scope="module")
def twins(tmp_path_factory) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    """One vocabulary of 500 tokens, read by us from GGUF and by the library from its JSON."""
    source = GOLDEN / "tiny" / "llama" / "tokenizer.json"
    description = json.loads(source.read_text())
    vocabulary = description["model"]["vocab"]
    special = {token["content"] for token in description["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    assert [vocabulary[token] for token in tokens] == list(range(len(tokens)))
    merges = [m if isinstance(m, str) else " ".join(m) for m in description["model"]["merges"]]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        TOKENS: tokens,
        TYPES: [CONTROL if token in special else NORMAL for token in tokens],
        MERGES: merges,
    }
    path = write_gguf(tmp_path_factory.mktemp("twins") / "m.gguf", metadata)
    return load_tokenizer(open_gguf(path)), tokenizers.Tokenizer.from_file(str(source))


PIECES = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|", "s>", " ", "  ", "the", "\n", "12", "é"]


@given(text=st.lists(st.sampled_from(PIECES) | st.text(max_size=4)).map("".join))
def test_ids_equal_those_of_the_tokenizers_library(twins, text):
    ours, theirs = twins
    wanted = theirs.encode(text, add_special_tokens=False).ids
    assert ours.encode(text, parse_special=True) == wanted


# How each pre-tokenizer splits one text, checked by hand against the models' own patterns.
TEXT = "I'LL don't 12345 a/b!\n\n  x東京 HTTPServer é½\r\n"
CUTS = {
    "default": "I|'|LL| don|'|t| |123|45| a|/|b|!|\n\n | x東京| HTTPServer| é|½|\r\n",
    "gpt-2": "I|'|LL| don|'t| 12345| a|/|b|!|\n\n | x東京| HTTPServer| é|½|\r\n",
    "smollm": "I|'|LL| don|'t| |1|2|3|4|5| a|/|b|!|\n\n | x東京| HTTPServer| é|½|\r\n",
    "llama-bpe": "I|'LL| don|'t| |123|45| a|/b|!\n\n| | x東京| HTTPServer| é|½|\r\n",
    "dbrx": "I|'LL| don|'t| |123|45| a|/b|!\n\n| | x東京| HTTPServer| é|½|\r\n",
    "qwen2": "I|'LL| don|'t| |1|2|3|4|5| a|/b|!\n\n| | x東京| HTTPServer| é|½|\r\n",
    "qwen35": "I|'LL| don|'t| |1|2|3|4|5| a|/b|!\n\n| | x東京| HTTPServer| é|½|\r\n",
    "seed-coder": "I|'LL| don|'t| |1|2|3|4|5| a|/b|!|\n\n| | x東京| HTTPServer| é|½|\r\n",
    "tekken": "I|'LL| don|'t| |1|2|3|4|5| a|/b|!\n\n| | x東京| HTTPServer| é|½|\r\n",
    "gpt-4o": "I'LL| don't| |123|45| a|/b|!\n\n| | x東京| HTTPServer| é|½|\r\n",
    "deepseek-v3": "I|'LL| don|'t| |123|45| a|/b|!\n\n| | x|東京| HTTPServer| é|½|\r\n",
    "deepseek-coder": (
        "I|'|LL| don|'|t| |1|2|3|4|5| a|/|b|!|\n|\n| | x|東京| HTTPServer| é|½|\r|\n"
    ),
    "falcon": "I|'|LL| don|'|t| |123|45| a|/|b|!|\n\n | x東京| HTTPServer| é|½|\r\n",
}


@pytest.mark.parametrize("name", CUTS)
def test_text_is_split_as_the_pre_tokenizer_says(name):
    pieces = PRE_TOKENIZERS[name].build().pre_tokenize_str(TEXT)
    as_text = [p.translate(BYTE_OF_CHARACTER).encode("latin-1").decode() for p, _ in pieces]
    assert as_text == CUTS[name].split("|")


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_pre_tokenizer_loses_nothing(load, name):
    tokenizer = load(pre=name)
    for text in (TEXT, "", "\0", "\u2028 \u3000", "ا ب 🙂\u200d", "a" * 1000):
        ids = tokenizer.encode(text, parse_special=False)
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


def test_a_word_that_is_a_token_ignores_merges_if_the_model_says_so(load):
    changes = with_more_tokens(xyz=NORMAL)
    whole = load(pre="llama-bpe", **changes).encode("xyz", parse_special=False)
    merged = load(pre="qwen2", **changes).encode("xyz", parse_special=False)
    assert (len(whole), len(merged)) == (1, 3)


# ---- Special tokens


def test_the_text_of_a_control_token_is_one_id_only_if_parsed(load):
    tokenizer = load()
    assert tokenizer.encode("<|im_end|>", parse_special=True) == [2]
    plain = tokenizer.encode("<|im_end|>", parse_special=False)
    assert plain == [3 + byte for byte in b"<|im_end|>"]


def test_a_user_defined_token_is_always_one_id(load):
    tokenizer = load(**with_more_tokens(**{"<tool>": USER_DEFINED}))
    id = tokenizer.vocab_size - 1
    for parse_special in (False, True):
        assert tokenizer.encode("a<tool>b", parse_special=parse_special)[1] == id
    assert "<tool>" not in tokenizer.special_tokens and not tokenizer.is_special(id)


def test_the_longest_of_several_special_tokens_wins(load):
    texts = {"<a": CONTROL, "<a><b>": CONTROL, "<a>": CONTROL, "<b>c": USER_DEFINED}
    tokenizer = load(**with_more_tokens(**texts))
    first = tokenizer.vocab_size - 4
    assert tokenizer.encode("<a><b>c", parse_special=True) == [first + 1, 3 + ord("c")]
    assert tokenizer.encode("<a><a", parse_special=True) == [first + 2, first]
    assert tokenizer.encode("<b>c<a>", parse_special=True) == [first + 3, first + 2]


@given(
    texts=st.sets(st.text("ab<|.", min_size=1, max_size=6), max_size=12),
    text=st.text("ab<|.", max_size=40),
)
def test_the_pattern_finds_the_leftmost_then_longest(texts, text):
    pattern = longest_match_pattern(texts)
    if pattern is None:
        assert not texts
        return
    naive = re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))
    assert [m.span() for m in pattern.finditer(text)] == [m.span() for m in naive.finditer(text)]


def test_tokens_decode_to_their_bytes(load):
    changes = with_more_tokens(**{"<tool>": USER_DEFINED, "▁odd": NORMAL, "Ġ東": NORMAL})
    tokenizer = load(**changes)
    size = tokenizer.vocab_size
    assert tokenizer.token_bytes(0) == b"<|endoftext|>"
    for byte in range(256):
        assert tokenizer.token_bytes(3 + byte) == bytes([byte])
    assert tokenizer.token_bytes(size - 3) == b"<tool>"
    assert tokenizer.token_bytes(size - 2) == "▁odd".encode()
    assert tokenizer.token_bytes(size - 1) == "Ġ東".encode()


def test_ids_outside_the_vocabulary_are_errors(load):
    tokenizer = load()
    for id in (-1, tokenizer.vocab_size, 2**40):
        for method in (tokenizer.token_bytes, tokenizer.token_text):
            with pytest.raises(IndexError, match=f"token id {id} is outside the vocabulary"):
                method(id)


# ---- Metadata


def test_the_file_or_else_the_pre_tokenizer_decides_whether_bos_is_added(load):
    assert not load(add_bos_token=None).add_bos
    assert load(add_bos_token=True).add_bos
    assert load(add_bos_token=None, pre="llama-bpe").add_bos
    assert not load(add_bos_token=False, pre="llama-bpe").add_bos
    without = load(add_bos_token=True, bos_token_id=None)
    assert without.bos_id is None and not without.add_bos


def test_end_ids_are_eos_eot_eom_and_the_well_known_control_tokens(load):
    assert load().end_ids == {0, 2}  # <|endoftext|> is known by its text
    assert load(eos_token_id=1).end_ids == {0, 1, 2}  # and <|im_end|>
    assert load(eos_token_id=None).end_ids == {0, 2}
    assert load(eot_token_id=5, eom_token_id=6).end_ids == {0, 2, 5, 6}


@pytest.mark.parametrize("type", [CONTROL, NORMAL, USER_DEFINED])
@pytest.mark.parametrize("text", ["<|eot_id|>", "<end_of_turn>", "<|end|>", "<|end_of_text|>"])
def test_a_token_that_ends_an_answer_is_control_whatever_its_type_in_the_file(load, text, type):
    tokenizer = load(**with_more_tokens(**{text: type, "<|other|>": type}))
    assert tokenizer.end_ids == {0, 2, tokenizer.vocab_size - 2}
    assert tokenizer.is_special(tokenizer.vocab_size - 2)
    assert tokenizer.is_special(tokenizer.vocab_size - 1) == (type == CONTROL)
    assert tokenizer.encode(text, parse_special=True) == [tokenizer.vocab_size - 2]
    assert len(tokenizer.encode(text, parse_special=False)) > 1


def test_a_named_id_outside_the_vocabulary_is_ignored_with_a_warning(load, caplog):
    tokenizer = load(bos_token_id=99999, eot_token_id=2**32 - 1)
    assert tokenizer.bos_id is None and tokenizer.end_ids == {0, 2}
    assert "tokenizer.ggml.bos_token_id 99999 is outside its" in caplog.text


def test_a_missing_pre_tokenizer_falls_back_to_default_with_a_warning(load, caplog):
    assert load(pre=None).encode("hello", parse_special=False)
    assert "names no pre-tokenizer" in caplog.text


def test_token_types_may_be_missing(load):
    tokenizer = load(token_type=None)
    assert tokenizer.special_tokens == {"<|endoftext|>": 0, "<|im_end|>": 2}  # they end answers
    assert len(tokenizer.encode(TINY_SPECIALS[1], parse_special=True)) == len(TINY_SPECIALS[1])


def test_special_tokens_may_be_prefixes_of_each_other(load):
    texts = {"<" * n: CONTROL for n in range(2, 257)}
    tokenizer = load(**with_more_tokens(**texts))
    assert tokenizer.encode("<" * 257, parse_special=True) == [tokenizer.vocab_size - 1, 3 + 60]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "its tokenizer has type 'bert'; only byte-level BPE"),
        ({"model": "llama"}, "key 'tokenizer.ggml.scores' must be an array of 270 numbers"),
        ({"model": None}, "its tokenizer has type None"),
        ({"pre": "brand-new"}, "its pre-tokenizer 'brand-new' .* is unknown; known: a.x-4.0, "),
        ({"tokens": None}, "key 'tokenizer.ggml.tokens' must be an array of strings"),
        ({"tokens": [1, 2]}, "key 'tokenizer.ggml.tokens' must be list, but it is array"),
        ({"tokens": [True]}, "key 'tokenizer.ggml.tokens' must be an array of strings"),
        ({"tokens": "text"}, "key 'tokenizer.ggml.tokens' must be list, but it is str"),
        ({"merges": None}, "key 'tokenizer.ggml.merges' must be an array of strings"),
        ({"merges": ["nothing"]}, "its vocabulary is not usable: "),
        ({"merges": ["x y"]}, "its vocabulary is not usable: "),
        ({"token_type": [1, 2]}, "key 'tokenizer.ggml.token_type' must be an array of 270 numbers"),
        ({"token_type": "x" * 270}, "key 'tokenizer.ggml.token_type' must be an array of 270"),
        ({"bos_token_id": "one"}, "key 'tokenizer.ggml.bos_token_id' must be int, but it is str"),
        ({"add_bos_token": 1}, "key 'tokenizer.ggml.add_bos_token' must be bool, but it is int"),
        (
            {"tokens": ["a", "a"], "token_type": None},
            "its vocabulary is not usable: 1 tokens are duplicates",
        ),
        ({"tokens": [b"\xff", *byte_characters()], "token_type": None}, "not usable: "),
        (with_more_tokens(**{"<" * n: CONTROL for n in range(2, 258)}), "up to 257 characters"),
        (with_more_tokens(**{f"<{n:0200}>": CONTROL for n in range(1300)}), "262635 in total"),
    ],
)
def test_refuses_a_vocabulary_it_cannot_use(load, changes, message):
    with pytest.raises(ModelError, match=message):
        load(**changes)
