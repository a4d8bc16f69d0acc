"""Variants of tokenizer.json as Hugging Face models have them, and folders with them."""

import json
import os
from pathlib import Path
from typing import Any

from llmsrv.text.sentencepiece import merges_from_scores
from tests.support.sentencepiece import sentencepiece_vocabulary

TINY = Path(__file__).parents[1] / "data" / "golden" / "tiny"
Json = dict[str, Any]


def folder_with(path: Path, **files: Json) -> Path:
    """A copy of the tiny llama's folder with JSON files replaced, named without ".json"."""
    path.mkdir()
    for name in os.listdir(TINY / "llama"):
        (path / name).symlink_to(TINY / "llama" / name)
    for stem, content in files.items():
        (path / f"{stem}.json").unlink(missing_ok=True)
        (path / f"{stem}.json").write_text(json.dumps(content))
    return path


def tiny_json(**changes: object) -> Json:
    return json.loads((TINY / "llama" / "tokenizer.json").read_text()) | changes


def token(text: str, id: int, **changes: bool) -> Json:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id, "content": text, "special": True, **flags, **changes}


# ---- One function for each kind of tokenizer


def byte_level() -> Json:
    return tiny_json()


def qwen() -> Json:
    """A normalizer, a pattern before the byte step, and an added token that is not special."""
    split = {"type": "Split", "pattern": {"Regex": r"\p{N}| ?\p{L}+|\s+"}, "behavior": "Isolated"}
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    description = tiny_json(
        normalizer={"type": "NFC"},
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [split | {"invert": False}, to_bytes | {"use_regex": False}],
        },
    )
    description["added_tokens"] += [token("<tool>", 500, special=False)]
    return description


def byte_level_with_prefix_space() -> Json:
    to_bytes = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
    return tiny_json(pre_tokenizer=to_bytes | {"use_regex": True})


def phi() -> Json:
    """Special tokens that strip the whitespace next to them."""
    description = tiny_json()
    description["added_tokens"][2]["rstrip"] = True
    description["added_tokens"][3]["lstrip"] = True
    return description


def sentencepiece(normalizer: Json | None, pre_tokenizer: Json | None) -> Json:
    """The small vocabulary as a tokenizer.json."""
    vocabulary = sentencepiece_vocabulary()
    tokens, types, scores = (
        vocabulary[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type", "scores")
    )
    assert isinstance(tokens, list) and isinstance(types, list) and isinstance(scores, list)
    added = [token(text, id) for id, text in enumerate(tokens[:3])]
    added += [
        token(text, id, special=False) for id, text in enumerate(tokens) if types[id] == 4
    ]
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": {"type": "ByteFallback"},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {text: id for id, text in enumerate(tokens)},
            "merges": [list(pair) for pair in merges_from_scores(tokens, types, scores)],
        },
    }


def replace() -> Json:
    return {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}


def gemma() -> Json:
    return sentencepiece(replace(), None)


def llama2() -> Json:
    prepend = {"type": "Prepend", "prepend": "▁"}
    return sentencepiece({"type": "Sequence", "normalizers": [prepend, replace()]}, None)


def metaspace(scheme: str) -> Json:
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}


def mistral() -> Json:
    return sentencepiece(None, metaspace("first"))


def mistral_in_a_sequence() -> Json:
    digits = {"type": "Digits", "individual_digits": True}
    steps = {"type": "Sequence", "pretokenizers": [metaspace("first"), digits]}
    return sentencepiece(None, steps)


def metaspace_always() -> Json:
    return sentencepiece(None, metaspace("always") | {"split": True})


def metaspace_never() -> Json:
    return sentencepiece(None, metaspace("never"))


KINDS = [
    byte_level,
    qwen,
    byte_level_with_prefix_space,
    phi,
    gemma,
    llama2,
    mistral,
    mistral_in_a_sequence,
    metaspace_always,
    metaspace_never,
]
