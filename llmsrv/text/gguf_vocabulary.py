"""Reads the vocabulary of a GGUF file from its metadata (tokenizer.ggml.*).

There are two types: byte-level BPE ("gpt2"), whose merges are in the file, and SentencePiece BPE
("llama"), whose merges follow from the scores of the tokens (sentencepiece.py).
Source: llama.cpp, src/llama-vocab.cpp, for the defaults of missing keys.
"""

import logging
import re
from array import array
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import normalizers
from tokenizers.models import BPE

from llmsrv.errors import ModelError
from llmsrv.files.gguf import GGUFFile
from llmsrv.text.pre_tokenizers import PRE_TOKENIZERS
from llmsrv.text.pre_tokenizers import PreTokenizer
from llmsrv.text.sentencepiece import cached_merges
from llmsrv.text.vocabulary import END_TOKEN_TEXTS
from llmsrv.text.vocabulary import METASPACE
from llmsrv.text.vocabulary import DecoderType
from llmsrv.text.vocabulary import TokenType
from llmsrv.text.vocabulary import Vocabulary

log = logging.getLogger(__name__)

PLAIN_TYPES = frozenset((TokenType.NORMAL, TokenType.USER_DEFINED))
BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
NAMED_IDS = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "eot": "tokenizer.ggml.eot_token_id",
    "eom": "tokenizer.ggml.eom_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
    "pad": "tokenizer.ggml.padding_token_id",
}


def read_gguf(gguf: GGUFFile, cache_dir: Path | None) -> Vocabulary:
    """Raises ModelError if something is missing or malformed, and any exception that the tokenizers
    library raises for a vocabulary it does not accept."""
    model = gguf.get("tokenizer.ggml.model", str)
    if model == "gpt2":
        return _read_byte_level(gguf)
    if model == "llama":
        return _read_sentencepiece(gguf, cache_dir)
    raise ModelError(
        f"{gguf.path}: its tokenizer has type {model!r}; only byte-level BPE ('gpt2') and "
        "SentencePiece BPE ('llama') are supported"
    )


def _read_byte_level(gguf: GGUFFile) -> Vocabulary:
    tokens = _strings(gguf, "tokenizer.ggml.tokens")
    merges = _strings(gguf, "tokenizer.ggml.merges")
    pre_tokenizer = _pre_tokenizer(gguf)
    pairs = [merge.partition(" ")[::2] for merge in merges]
    bpe = BPE(_ids_by_text(tokens), pairs, ignore_merges=pre_tokenizer.ignore_merges)
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizer.build()
    ids = _named_ids(gguf, {}, len(tokens))
    return Vocabulary(
        bpe=tokenizer,
        tokens=tokens,
        types=_types(gguf, tokens),
        decoder=DecoderType.BYTE_LEVEL,
        named_ids=ids,
        end_ids=_end_ids(ids),
        add_bos=_flag(gguf, "tokenizer.ggml.add_bos_token", pre_tokenizer.add_bos),
    )


def _read_sentencepiece(gguf: GGUFFile, cache_dir: Path | None) -> Vocabulary:
    tokens = _strings(gguf, "tokenizer.ggml.tokens")
    types = _types(gguf, tokens)
    scores = _numbers(gguf, "tokenizer.ggml.scores", len(tokens))
    ids = _named_ids(gguf, {"unk": 0, "bos": 1, "eos": 2}, len(tokens))
    bpe = BPE(
        _ids_by_text(tokens),
        cached_merges(tokens, types, scores, cache_dir),
        unk_token=tokens[ids["unk"]] if "unk" in ids else None,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = tokenizers.Tokenizer(bpe)
    # As in llama.cpp, text at the beginning and after each special token gets a leading space.
    prefix = _flag(gguf, "tokenizer.ggml.add_space_prefix", True)
    steps = [normalizers.Prepend(METASPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", METASPACE)])
    return Vocabulary(
        bpe=tokenizer,
        tokens=tokens,
        types=types,
        decoder=DecoderType.SENTENCEPIECE,
        named_ids=ids,
        end_ids=_end_ids(ids),
        add_bos=_flag(gguf, "tokenizer.ggml.add_bos_token", True),
    )


def _end_ids(named_ids: dict[str, int]) -> frozenset[int]:
    return frozenset(named_ids[name] for name in ("eos", "eot", "eom") if name in named_ids)


def _flag(gguf: GGUFFile, key: str, default: bool) -> bool:
    value = gguf.get(key, bool)
    return default if value is None else value


def _ids_by_text(tokens: list[str]) -> dict[str, int]:
    vocabulary = {text: id for id, text in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        raise ValueError(f"{len(tokens) - len(vocabulary)} tokens are duplicates")
    return vocabulary


def _pre_tokenizer(gguf: GGUFFile) -> PreTokenizer:
    name = gguf.get("tokenizer.ggml.pre", str)
    if name is None:
        log.warning("%s names no pre-tokenizer; using 'default', which may be wrong", gguf.path)
        name = "default"
    if name not in PRE_TOKENIZERS:
        raise ModelError(
            f"{gguf.path}: its pre-tokenizer {name!r} (tokenizer.ggml.pre) is unknown; known: "
            f"{', '.join(sorted(PRE_TOKENIZERS))}"
        )
    return PRE_TOKENIZERS[name]


def _strings(gguf: GGUFFile, key: str) -> list[str]:
    strings = gguf.get(key, list)
    if not strings or not isinstance(strings[0], str):
        raise ModelError(f"{gguf.path}: key '{key}' must be an array of strings")
    return strings


def _types(gguf: GGUFFile, tokens: list[str]) -> Sequence[float]:
    """The token types; all NORMAL if the file has none.  Some converters type the tokens that end
    an answer as plain text, which models would print without end: they are always CONTROL."""
    key = "tokenizer.ggml.token_type"
    types: list[float] = [TokenType.NORMAL] * len(tokens)
    if key in gguf.metadata:
        types = list(_numbers(gguf, key, len(tokens)))
    for id, type in enumerate(types):
        if type == TokenType.BYTE and not BYTE_TOKEN.fullmatch(tokens[id]):
            raise ModelError(f"{gguf.path}: token {id}, {tokens[id]!r}, must be a byte as <0x41>")
        if type in PLAIN_TYPES and tokens[id] in END_TOKEN_TEXTS:
            log.warning("%s: token %d, %r, is not typed as control", gguf.path, id, tokens[id])
            types[id] = TokenType.CONTROL
    return types


def _numbers(gguf: GGUFFile, key: str, count: int) -> Sequence[float]:
    numbers = gguf.metadata.get(key)
    if not isinstance(numbers, array) or len(numbers) != count:
        raise ModelError(f"{gguf.path}: key '{key}' must be an array of {count} numbers")
    return numbers


def _named_ids(gguf: GGUFFile, defaults: dict[str, int], count: int) -> dict[str, int]:
    """The ids of bos, eos and so on; ignores an id outside the vocabulary.

    defaults    of this tokenizer type, for ids that the file does not name"""
    found = dict(defaults)
    for name, key in NAMED_IDS.items():
        id = gguf.get(key, int)
        if id is not None:
            found[name] = id
            if not 0 <= id < count:
                log.warning("%s: %s %d is outside its %d tokens", gguf.path, key, id, count)
    return {name: id for name, id in found.items() if 0 <= id < count}
