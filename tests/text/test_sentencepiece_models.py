"""SentencePiece tokenizers: the same ids as the SentencePiece library, and those of Gemma 3."""

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

from llmsrv.files.gguf import open_gguf
from llmsrv.text.detokenizer import Detokenizer
from llmsrv.text.tokenizer import Tokenizer
from llmsrv.text.tokenizer import load_tokenizer
from tests.support.sentencepiece import BYTE
from tests.support.sentencepiece import CONTROL
from tests.support.sentencepiece import NORMAL
from tests.support.sentencepiece import UNKNOWN
from tests.support.sentencepiece import USER_DEFINED
from tests.support.sentencepiece import printed
from tests.support.sentencepiece import small_file

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parents[1] / "data" / "golden"


# ---- The SentencePiece library


@pytest.mark.compat
def test_ids_equal_those_of_the_sentencepiece_library(tmp_path: Path) -> None:
    library = pytest.importorskip("sentencepiece")
    text = (ROOT / "LICENSE").read_text()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_prefix=str(tmp_path / "trained"),
        model_type="bpe",
        vocab_size=900,
        byte_fallback=True,
        user_defined_symbols=["<b>", "<x|y>"],
        add_dummy_prefix=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    theirs = library.SentencePieceProcessor(model_file=str(tmp_path / "trained.model"))
    ours = load_tokenizer(small_file(tmp_path / "m.gguf", **trained_vocabulary(theirs)))
    pieces = ["a", " ", "  ", "the", "é", "東", "1", "<b>", "<x|y>", "\n", "aaa", "==", "🙂"]
    rng = random.Random(0)
    samples = ["".join(rng.choices(pieces, k=30)) for _ in range(2000)]
    for sample in [*samples, *text.splitlines(), text]:
        assert ours.encode(sample, parse_special=False) == theirs.encode(sample)


def trained_vocabulary(library: Any) -> dict[str, object]:
    """Changes for small_file."""
    ids = range(library.vocab_size())
    tokens = [library.id_to_piece(id) for id in ids]

    def token_type(id: int) -> int:
        kinds = [(library.is_unknown, UNKNOWN), (library.is_control, CONTROL)]
        kinds += [(library.is_byte, BYTE), (lambda id: tokens[id][0] == "<", USER_DEFINED)]
        return next((type for is_kind, type in kinds if is_kind(id)), NORMAL)

    return {
        "tokens": tokens,
        "token_type": [token_type(id) for id in ids],
        "scores": [library.get_score(id) for id in ids],
        "add_space_prefix": False,
    }


# ---- Gemma 3


@pytest.fixture(scope="session")
def gemma3_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def gemma3_tokenizer(gemma3: Path, gemma3_cache: Path) -> Tokenizer:
    return load_tokenizer(open_gguf(gemma3), gemma3_cache)


@pytest.mark.slow
def test_golden_ids_of_gemma3(gemma3_tokenizer: Tokenizer) -> None:
    cases = json.loads((GOLDEN / "tokens-gemma-3-270m.json").read_text())["cases"]
    assert len(cases) == 99
    for case in cases:
        ids = gemma3_tokenizer.encode(case["text"], parse_special=True)
        assert ids == case["ids"]
        assert printed(gemma3_tokenizer, ids) == case["text"]


@pytest.mark.slow
def test_golden_prompts_and_answers_of_gemma3(gemma3_tokenizer: Tokenizer) -> None:
    cases = json.loads((GOLDEN / "gemma-3-270m-q4_k_m.json").read_text())["cases"]
    for case in cases:
        assert gemma3_tokenizer.encode(case["text"], parse_special=True) == case["prompt_ids"]
        detokenizer = Detokenizer(gemma3_tokenizer, skip_special_tokens=False)
        text = "".join(detokenizer.push([id]) for id in case["greedy_ids"]) + detokenizer.flush()
        assert text == case["greedy_text"]


@pytest.mark.slow
def test_facts_of_gemma3(gemma3_tokenizer: Tokenizer) -> None:
    tokenizer = gemma3_tokenizer
    assert tokenizer.vocab_size == 262_144
    assert tokenizer.bos_id == 2 and tokenizer.add_bos
    assert tokenizer.end_ids == {1, 106}  # <eos>, <end_of_turn>
    assert len(tokenizer.special_tokens) == 6249


@pytest.mark.slow
def test_gemma3_loads_quickly_the_second_time(
    gemma3: Path, gemma3_tokenizer: Tokenizer, gemma3_cache: Path
) -> None:
    file = open_gguf(gemma3)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        load_tokenizer(file, gemma3_cache)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.5  # 0.6 on most machines
