"""Reads the vocabulary of a Hugging Face folder: tokenizer.json, and what tokenizer_config.json,
generation_config.json and config.json say beside it.

The `tokenizers` library gets tokenizer.json without its added tokens and its template: which text
means a special token, and whether BOS comes first, is ours to decide.
Source: the library's own reader (tokenizer/serialization.rs) and transformers,
tokenization_utils_base.py.
"""

import json
import re
from collections.abc import Iterator
from typing import Annotated
from typing import Any
from typing import TypeVar

import msgspec
import tokenizers
from msgspec import Meta
from tokenizers.models import BPE

from llmsrv.errors import ModelError
from llmsrv.files.folder import ModelFolder
from llmsrv.files.mapped import map_file
from llmsrv.files.mapped import short_repr
from llmsrv.text.vocabulary import Spelling
from llmsrv.text.vocabulary import TokenType
from llmsrv.text.vocabulary import Vocabulary

# Gemma 3: 33 MB and 262,208 ids.
MAX_JSON_BYTES = 1 << 27
MAX_IDS = 1 << 22
# Some models' tokens between turns are not marked as special; typed by a user they are text.
CONTROL_LOOK = re.compile("<\\|.*\\|>|<｜.*｜>")

Id = Annotated[int, Meta(ge=0, lt=MAX_IDS)]
Step = dict[str, Any]
T = TypeVar("T")


class _AddedToken(msgspec.Struct):
    id: Id
    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class _File(msgspec.Struct):
    """tokenizer.json; the model is read when its kind is known."""

    model: msgspec.Raw
    added_tokens: list[_AddedToken] = []
    normalizer: Step | None = None
    pre_tokenizer: Step | None = None
    post_processor: Step | None = None
    decoder: Step | None = None


class _Kind(msgspec.Struct):
    type: str | None = None
    merges: msgspec.Raw = msgspec.Raw()


class _BPE(msgspec.Struct):
    vocab: dict[str, Id]
    merges: list[str | tuple[str, str]]
    unk_token: str | None = None
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None
    fuse_unk: bool | None = None
    byte_fallback: bool | None = None
    ignore_merges: bool | None = None


def read_folder(folder: ModelFolder) -> Vocabulary:
    """Raises ModelError for what is missing or malformed, and whatever the tokenizers library
    raises for a vocabulary that it does not take."""
    file, model = _read(folder)
    added = file.added_tokens
    id_of = model.vocab | {token.content: token.id for token in added}
    tokens = _tokens(id_of, folder.config)
    named_ids = _named_ids(folder, id_of, len(tokens))
    return Vocabulary(
        merges=_merges(file, model),
        tokens=tokens,
        types=_types(tokens, added, _byte_ids(model)),
        spelling=_spelling(file),
        named_ids=named_ids,
        end_ids=_end_ids(folder, named_ids, len(tokens)),
        add_bos=_adds_bos(folder, file.post_processor, named_ids.get("bos")),
        blank_first=any(map(_is_first_metaspace, _steps(file.pre_tokenizer))),
        strips_before=frozenset(token.content for token in added if token.lstrip),
        strips_after=frozenset(token.content for token in added if token.rstrip),
    )


def _read(folder: ModelFolder) -> tuple[_File, _BPE]:
    path = folder.tokenizer_json
    if path is None:
        raise ModelError(f"{folder.path}: has no tokenizer.json")
    data = map_file(path, "a JSON file", min_bytes=2)
    if len(data) > MAX_JSON_BYTES:
        raise ModelError(f"{path}: has {len(data)} bytes; the limit is {MAX_JSON_BYTES}")
    try:
        file = msgspec.json.decode(data, type=_File)
        kind = msgspec.json.decode(file.model, type=_Kind)
        if kind.type != "BPE" and (kind.type is not None or not bytes(kind.merges)):
            raise ModelError(f"{path}: has type {short_repr(kind.type)}; only BPE is supported")
        return file, msgspec.json.decode(file.model, type=_BPE)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{path}: is not a tokenizer: {error}") from None


def _tokens(id_of: dict[str, int], config: dict[str, object]) -> list[str]:
    """The texts by id.  Ids without a text are empty: the model's output has as many values as
    config.json says, and may take any of them."""
    text_config = config.get("text_config")
    inner = text_config if isinstance(text_config, dict) else {}
    vocab_size = config.get("vocab_size", inner.get("vocab_size"))
    if not id_of:
        raise ValueError("it has no tokens")
    size = max(id_of.values()) + 1
    if isinstance(vocab_size, int):
        size = max(size, min(vocab_size, MAX_IDS))
    tokens = [""] * size
    for text, id in id_of.items():
        tokens[id] = text
    return tokens


def _byte_ids(model: _BPE) -> list[int]:
    """The ids that stand for single bytes, where the model falls back to them."""
    texts = [f"<0x{byte:02X}>" for byte in range(256)] if model.byte_fallback else []
    return [model.vocab[text] for text in texts if text in model.vocab]


def _types(tokens: list[str], added: list[_AddedToken], byte_ids: list[int]) -> list[int]:
    types: list[int] = [TokenType.NORMAL if text else TokenType.UNUSED for text in tokens]
    for id in byte_ids:
        types[id] = TokenType.BYTE
    for token in added:
        if token.single_word:
            raise ValueError(f"its token {token.content!r} stands for whole words only")
        is_control = token.special or CONTROL_LOOK.fullmatch(token.content)
        types[token.id] = TokenType.CONTROL if is_control else TokenType.USER_DEFINED
    return types


def _merges(file: _File, model: _BPE) -> tokenizers.Tokenizer:
    """The library's tokenizer without special tokens."""
    bare: dict[str, Any] = {
        "added_tokens": [],
        "normalizer": file.normalizer,
        "pre_tokenizer": _without_first(file.pre_tokenizer),
        "post_processor": None,
        "decoder": None,
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }
    pairs = [_pair(merge) if isinstance(merge, str) else merge for merge in model.merges]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(bare))
    options = msgspec.structs.asdict(model)
    del options["vocab"], options["merges"]
    present = {name: value for name, value in options.items() if value is not None}
    tokenizer.model = BPE(model.vocab, pairs, **present)
    return tokenizer


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


# ---- What the steps before and after merging do


def _steps(step: Step | None) -> Iterator[Step]:
    """A normalizer, pre-tokenizer, decoder or template, or those that a sequence of them has."""
    if step is None:
        return
    if step.get("type") != "Sequence":
        yield step
    for name in ("normalizers", "pretokenizers", "decoders", "processors"):
        for inner in step.get(name) or ():
            yield from _steps(inner)


def _is_first_metaspace(step: Step) -> bool:
    """Whether it puts a blank before the text at the very beginning, and nowhere else: what the
    library cannot tell, since it gets the text in pieces."""
    return step.get("type") == "Metaspace" and step.get("prepend_scheme") == "first"


def _without_first(step: Step | None) -> Step | None:
    """The pre-tokenizer without what _is_first_metaspace finds."""
    if step is None:
        return None
    if _is_first_metaspace(step):
        return step | {"prepend_scheme": "never"}
    if step.get("type") == "Sequence":
        return step | {"pretokenizers": [_without_first(inner) for inner in step["pretokenizers"]]}
    return step


def _spelling(file: _File) -> Spelling:
    kinds = {step.get("type", "") for step in (*_steps(file.pre_tokenizer), *_steps(file.decoder))}
    if "ByteLevel" in kinds:
        return Spelling.BYTE_LEVEL
    if kinds & {"Metaspace", "ByteFallback", "Replace"}:
        return Spelling.SENTENCEPIECE
    raise ValueError(f"its decoder is of the kind {sorted(kinds)}, which is not supported")


# ---- Ids that mean something


def _named_ids(folder: ModelFolder, id_of: dict[str, int], size: int) -> dict[str, int]:
    """bos, eos and the like by tokenizer_config.json, else by the other files."""
    found = {}
    for files in (folder.config, folder.generation_config):
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = _valid_ids(files.get(key), size)
            if ids:
                found[key.removesuffix("_token_id")] = ids[0]
    for key, value in folder.tokenizer_config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str) and text in id_of:
            found[key.removesuffix("_token")] = id_of[text]
    return found


def _end_ids(folder: ModelFolder, named_ids: dict[str, int], size: int) -> frozenset[int]:
    ids = [named_ids["eos"]] if "eos" in named_ids else []
    for files in (folder.config, folder.generation_config):
        ids += _valid_ids(files.get("eos_token_id"), size)
    return frozenset(ids)


def _valid_ids(value: object, size: int) -> list[int]:
    """An id or a list of them, as far as the vocabulary has them."""
    ids = value if isinstance(value, list) else [value]
    return [id for id in ids if type(id) is int and 0 <= id < size]


def _adds_bos(folder: ModelFolder, post_processor: Step | None, bos_id: int | None) -> bool:
    """As tokenizer_config.json says, else as the library's own template does."""
    says = folder.tokenizer_config.get("add_bos_token")
    if isinstance(says, bool):
        return says
    for step in _steps(post_processor):
        first = (step.get("single") or [{}])[0].get("SpecialToken")
        if first is not None:
            return bos_id in step["special_tokens"][first["id"]]["ids"]
    return False
