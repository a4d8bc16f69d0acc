"""SentencePiece vocabularies in GGUF: merges from scores, spaces, bytes, and the disk cache."""

import random
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from llmsrv.errors import ModelError
from llmsrv.text import sentencepiece
from llmsrv.text.chat_template import ChatTemplate
from llmsrv.text.detokenizer import Detokenizer
from llmsrv.text.sentencepiece import cached_merges
from llmsrv.text.sentencepiece import merges_from_scores
from llmsrv.text.tokenizer import Tokenizer
from llmsrv.text.tokenizer import load_tokenizer
from tests.support.parameters import slow_but
from tests.support.sentencepiece import BYTE
from tests.support.sentencepiece import CONTROL
from tests.support.sentencepiece import FIRST_BYTE
from tests.support.sentencepiece import LETTERS
from tests.support.sentencepiece import NORMAL
from tests.support.sentencepiece import USER_DEFINED_TEXTS
from tests.support.sentencepiece import merge_plainly
from tests.support.sentencepiece import merged_tokens
from tests.support.sentencepiece import printed
from tests.support.sentencepiece import sentencepiece_vocabulary
from tests.support.sentencepiece import small_file
from tests.support.sentencepiece import texts

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parents[1] / "data" / "golden"
Load = Callable[..., Tokenizer]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Loads the small vocabulary with some metadata replaced; None removes a key."""

    def load(cache_dir: Path | None = None, **changes: object) -> Tokenizer:
        return load_tokenizer(small_file(tmp_path / "m.gguf", **changes), cache_dir)

    return load


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Without a space before the text, as in Gemma."""
    path = tmp_path_factory.mktemp("small") / "m.gguf"
    return load_tokenizer(small_file(path, add_space_prefix=False))


# ---- Merging


@settings(max_examples=100)
@given(text=st.text(LETTERS, max_size=40))
def test_text_is_merged_like_the_plain_algorithm_does(small: Tokenizer, text: str) -> None:
    score_of = {token: -float(n) for n, token in enumerate(merged_tokens())}
    assert texts(small, text) == merge_plainly(text, score_of)


@pytest.mark.parametrize("seed", range(20))
def test_one_pair_per_token_is_equivalent_to_all_scores(seed: int) -> None:
    """Scores in any order: a token may have a higher score than its parts."""
    tokens = [*merged_tokens(60, seed), *LETTERS]
    scores = [float(n) for n in random.Random(seed).sample(range(1000), len(tokens))]
    score_of = dict(zip(tokens, scores))
    pairs = merges_from_scores(tokens, [NORMAL] * len(tokens), scores)
    rank_of = {pair: rank for rank, pair in enumerate(pairs)}
    for token in tokens:
        text = token + tokens[seed] + token
        assert merged_by_rank(text, rank_of) == merge_plainly(text, score_of)


def merged_by_rank(text: str, rank_of: dict[tuple[str, str], int]) -> list[str]:
    parts = list(text)
    while pairs := [
        (rank_of[pair], i) for i, pair in enumerate(zip(parts, parts[1:])) if pair in rank_of
    ]:
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def test_the_leftmost_of_equal_pairs_is_joined(load: Load) -> None:
    tokens = ["<unk>", "<s>", "</s>", "a", "aa", "aaa"]
    tokenizer = load(
        tokens=tokens,
        token_type=[2, 3, 3, 1, 1, 1],
        scores=[0.0, 0.0, 0.0, -1.0, -2.0, -3.0],
        add_space_prefix=False,
    )
    assert texts(tokenizer, "aaa") == ["aaa"]
    assert texts(tokenizer, "aaaa") == ["aa", "aa"]
    assert texts(tokenizer, "aaaaa") == ["aa", "aaa"]


@pytest.mark.parametrize("unit", slow_but(["a", "▁", " ", "東", "z", "ab", "\n", "<b>"], "a", "東"))
def test_long_monotonous_text_takes_linear_time(small: Tokenizer, unit: str) -> None:
    text = unit * (100_000 // len(unit))
    start = time.process_time()
    ids = small.encode(text, parse_special=True)
    assert time.process_time() - start < 3
    assert printed(small, ids) == text.replace("▁", " ")


# ---- Spaces and bytes


@given(text=st.text())
def test_encoding_and_decoding_returns_the_text(small: Tokenizer, text: str) -> None:
    for parse_special in (False, True):
        ids = small.encode(text, parse_special=parse_special)
        assert printed(small, ids) == text.replace("▁", " ")


def test_a_space_is_put_before_the_text_and_after_each_special_token(load: Load) -> None:
    """As in llama.cpp, where a user-defined token counts as special."""
    for tokenizer in (load(), load(add_space_prefix=True)):
        assert printed(tokenizer, tokenizer.encode("q", parse_special=True)) == " q"
        ids = tokenizer.encode("<s>q</s>w", parse_special=True)
        assert printed(tokenizer, ids) == "<s> q</s> w"
        assert printed(tokenizer, tokenizer.encode(" q<b>w", parse_special=True)) == "  q<b> w"
        assert tokenizer.encode("", parse_special=True) == []
        assert tokenizer.encode("<s>", parse_special=True) == [1]


def test_a_chat_prompt_has_the_same_ids_as_its_text(load: Load) -> None:
    tokenizer = load()
    template = ChatTemplate("<s>{{ messages[0].content }}</s>ab", tokenizer)
    for content in ("ab", " ab", "a<b>b", "\n\n"):
        messages = [{"role": "user", "content": content}]
        text = template.render(messages)
        assert template.encode(messages) == tokenizer.encode(text, parse_special=True)
    ids = template.encode([{"role": "user", "content": "</s>"}])
    assert ids.count(1) == 1 and ids.count(2) == 1


def test_a_character_without_a_token_becomes_its_bytes(small: Tokenizer) -> None:
    assert texts(small, "z🙂") == ["<0x7A>", "<0xF0>", "<0x9F>", "<0x99>", "<0x82>"]
    assert [small.token_bytes(FIRST_BYTE + byte) for byte in range(256)] == [
        bytes([byte]) for byte in range(256)
    ]


def test_the_text_of_a_byte_token_is_not_a_byte(small: Tokenizer) -> None:
    ids = small.encode("<0x41>", parse_special=True)
    assert len(ids) > 1 and printed(small, ids) == "<0x41>"


def test_without_byte_tokens_the_unknown_token_is_used(load: Load) -> None:
    tokenizer = load(
        tokens=["<unk>", "<s>", "</s>", "a"], token_type=[2, 3, 3, 1], scores=[0.0, 0.0, 0.0, -1.0]
    )
    assert tokenizer.encode("azza", parse_special=True) == [0, 3, 0, 3]


def test_an_answer_keeps_its_leading_space(load: Load) -> None:
    """An answer continues its prompt, so its leading space is text, as in llama.cpp's server.  The
    space put before a prompt is not decoded, since prompts are not."""
    tokenizer = load()
    ids = tokenizer.encode("a 東z", parse_special=True)
    assert "".join(Detokenizer(tokenizer).push([id]) for id in ids) == " a 東z"


def test_control_tokens_keep_u2581(load: Load) -> None:
    vocabulary = sentencepiece_vocabulary()
    tokens = vocabulary["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    tokenizer = load(tokens=[tokens[0], "<▁>", *tokens[2:]])
    assert tokenizer.token_bytes(1) == "<▁>".encode()


# ---- Special tokens


def test_plain_text_never_becomes_a_control_token(small: Tokenizer) -> None:
    assert small.encode("<s>", parse_special=True) == [1]
    plain = small.encode("<s>", parse_special=False)
    assert 1 not in plain and printed(small, plain) == "<s>"


def test_the_longest_user_defined_token_wins(small: Tokenizer) -> None:
    for parse_special in (False, True):
        assert texts(small, "a\n\n\nb<b>", parse_special) == ["a", "\n\n", "\n", "b", "<b>"]
    assert not any(text in small.special_tokens for text in USER_DEFINED_TEXTS)


def test_missing_keys_default_to_those_of_llama_2(load: Load) -> None:
    tokenizer = load(bos_token_id=None, eos_token_id=None)
    assert tokenizer.bos_id == 1 and tokenizer.add_bos
    assert tokenizer.end_ids == {2}
    assert tokenizer.named_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert not load(add_bos_token=False).add_bos


# ---- The disk cache


def merges_file(cache: Path) -> Path:
    (found,) = (cache / "tokenizers").iterdir()
    return found


def test_merges_are_cached_in_a_private_folder(load: Load, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = load(cache)
    kept = merges_file(cache)
    assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    text = "".join(merged_tokens())
    again = load(cache).encode(text, parse_special=False)
    assert again == first.encode(text, parse_special=False) == load().encode(
        text, parse_special=False
    )


def test_cached_merges_are_not_computed_again(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(tmp_path / "cache")
    monkeypatch.setattr(sentencepiece, "merges_from_scores", lambda *_: pytest.fail("again"))
    load(tmp_path / "cache")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:],
        lambda data: bytes(32) + data[32:],
        lambda data: data + bytes(8),
    ],
)
def test_a_damaged_cache_file_is_written_again(
    load: Load,
    tmp_path: Path,
    damage: Callable[[bytes], bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    load(tmp_path / "cache")
    kept = merges_file(tmp_path / "cache")
    whole = kept.read_bytes()
    kept.write_bytes(damage(whole))
    assert texts(load(tmp_path / "cache"), "ab") == texts(load(), "ab")
    assert kept.read_bytes() == whole
    assert "is damaged; writing it again" in caplog.text


def test_another_vocabulary_has_another_file(load: Load, tmp_path: Path) -> None:
    vocabulary = sentencepiece_vocabulary()
    scores, types = (vocabulary[f"tokenizer.ggml.{key}"] for key in ("scores", "token_type"))
    assert isinstance(scores, list) and isinstance(types, list)
    load(tmp_path / "cache")
    load(tmp_path / "cache", scores=[*scores[:-1], -9.0])
    load(tmp_path / "cache", token_type=[*types[:-1], CONTROL])
    assert len(list((tmp_path / "cache" / "tokenizers").iterdir())) == 3


def test_vocabularies_with_the_same_joined_text_have_different_files(tmp_path: Path) -> None:
    for tokens in (["ab", "c", ""], ["a", "bc", ""], ["a", "", "bc"]):
        cached_merges(tokens, [NORMAL] * 3, [0.0] * 3, tmp_path)
    assert len(list((tmp_path / "tokenizers").iterdir())) == 3


def test_an_unwritable_cache_is_a_warning(
    load: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert texts(load(tmp_path / "file"), "ab") == texts(load(), "ab")
    assert "cannot cache the converted tokenizer" in caplog.text


# ---- Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None}, "key 'tokenizer.ggml.scores' must be an array of 392 numbers"),
        ({"scores": [1.0]}, "key 'tokenizer.ggml.scores' must be an array of 392 numbers"),
        ({"scores": ["a"] * 392}, "key 'tokenizer.ggml.scores' must be an array of 392 numbers"),
        ({"add_space_prefix": 1}, "'tokenizer.ggml.add_space_prefix' must be bool, but it is int"),
        ({"token_type": [BYTE] * 392}, "token 0, '<unk>', must be a byte as <0x41>"),
        (
            {"tokens": ["a" * 257, "b", "c"], "token_type": [1] * 3, "scores": [0.0] * 3},
            "its tokens have up to 257 characters, 259 in total; the limit is 256 each",
        ),
        (
            {
                "tokens": [f"{n:0256}" for n in range(2100)],
                "token_type": [1] * 2100,
                "scores": [0.0] * 2100,
            },
            "537600 in total; the limit is 256 each, and 134217728 for the sum",
        ),
    ],
)
def test_refuses_a_vocabulary_it_cannot_use(
    load: Load, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        load(**changes)
