"""Reads the vocabulary of a Hugging Face folder: tokenizer.json, plus details from
tokenizer_config.json, generation_config.json and config.json.

The `tokenizers` library gets tokenizer.json without its added tokens and its post-processor.  We
decide which text means a special token, and whether BOS comes first.
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
from llmsrv.text.vocabulary import DecoderType
from llmsrv.text.vocabulary import TokenType
from llmsrv.text.vocabulary import Vocabulary

# Gemma 3: 33 MB and 262,208 ids.
MAX_JSON_BYTES = 1 << 27
MAX_IDS = 1 << 22
# Some models do not mark their turn tokens as special; but typed by a user, they must stay text.
CONTROL_TOKEN_PATTERN = re.compile("<\\|.*\\|>|<｜.*｜>")

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


class _TokenizerJson(msgspec.Struct):
    """tokenizer.json; the model is decoded once its type is known."""

    model: msgspec.Raw
    added_tokens: list[_AddedToken] = []
    normalizer: Step | None = None
    pre_tokenizer: Step | None = None
    post_processor: Step | None = None
    decoder: Step | None = None


class _ModelType(msgspec.Struct):
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
    """Raises ModelError if something is missing or malformed, and any exception that the tokenizers
    library raises for a vocabulary it does not accept."""
    file, model = _read_tokenizer_json(folder)
    added = file.added_tokens
    id_of = model.vocab | {token.content: token.id for token in added}
    tokens = _tokens(id_of, folder.config)
    named_ids = _named_ids(folder, id_of, len(tokens))
    return Vocabulary(
        bpe=_build_bpe(file, model),
        tokens=tokens,
        types=_types(tokens, added, _byte_ids(model)),
        decoder=_decoder_type(file),
        named_ids=named_ids,
        end_ids=_end_ids(folder, named_ids, len(tokens)),
        add_bos=_adds_bos(folder, file.post_processor, named_ids.get("bos")),
        prepends_space=any(map(_prepends_space_at_start, _steps(file.pre_tokenizer))),
        lstrip_tokens=frozenset(token.content for token in added if token.lstrip),
        rstrip_tokens=frozenset(token.content for token in added if token.rstrip),
    )


def _read_tokenizer_json(folder: ModelFolder) -> tuple[_TokenizerJson, _BPE]:
    path = folder.tokenizer_json
    if path is None:
        raise ModelError(f"{folder.path}: has no tokenizer.json")
    data = map_file(path, "a JSON file", min_bytes=2)
    if len(data) > MAX_JSON_BYTES:
        raise ModelError(f"{path}: has {len(data)} bytes; the limit is {MAX_JSON_BYTES}")
    try:
        file = msgspec.json.decode(data, type=_TokenizerJson)
        model_type = msgspec.json.decode(file.model, type=_ModelType)
        type = model_type.type
        if type != "BPE" and (type is not None or not bytes(model_type.merges)):
            raise ModelError(f"{path}: has type {short_repr(type)}; only BPE is supported")
        return file, msgspec.json.decode(file.model, type=_BPE)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{path}: is not a tokenizer: {error}") from None


def _tokens(id_of: dict[str, int], config: dict[str, object]) -> list[str]:
    """The texts by id.  Ids without a text get an empty one: the model has vocab_size (config.json)
    logits and may output any of these ids."""
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
    """The ids of single-byte tokens, if the model uses byte fallback."""
    texts = [f"<0x{byte:02X}>" for byte in range(256)] if model.byte_fallback else []
    return [model.vocab[text] for text in texts if text in model.vocab]


def _types(tokens: list[str], added: list[_AddedToken], byte_ids: list[int]) -> list[int]:
    types: list[int] = [TokenType.NORMAL if text else TokenType.UNUSED for text in tokens]
    for id in byte_ids:
        types[id] = TokenType.BYTE
    for token in added:
        if token.single_word:
            raise ValueError(f"its token {token.content!r} matches single words only")
        is_control = token.special or CONTROL_TOKEN_PATTERN.fullmatch(token.content)
        types[token.id] = TokenType.CONTROL if is_control else TokenType.USER_DEFINED
    return types


def _build_bpe(file: _TokenizerJson, model: _BPE) -> tokenizers.Tokenizer:
    """Builds the library's tokenizer without special tokens."""
    bare: dict[str, Any] = {
        "added_tokens": [],
        "normalizer": file.normalizer,
        "pre_tokenizer": _without_prepended_space(file.pre_tokenizer),
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


# ---- Normalizers, pre-tokenizers, decoders and post-processors


def _steps(step: Step | None) -> Iterator[Step]:
    """Yields a normalizer, pre-tokenizer, decoder or post-processor, or those of a sequence."""
    if step is None:
        return
    if step.get("type") != "Sequence":
        yield step
    for name in ("normalizers", "pretokenizers", "decoders", "processors"):
        for inner in step.get(name) or ():
            yield from _steps(inner)


def _prepends_space_at_start(step: Step) -> bool:
    """True if the step puts a space only before the text at the very beginning.  The library cannot
    do that here, because it gets the text in pieces."""
    return step.get("type") == "Metaspace" and step.get("prepend_scheme") == "first"


def _without_prepended_space(step: Step | None) -> Step | None:
    """The pre-tokenizer without the steps that _prepends_space_at_start finds."""
    if step is None:
        return None
    if _prepends_space_at_start(step):
        return step | {"prepend_scheme": "never"}
    if step.get("type") == "Sequence":
        inner = [_without_prepended_space(inner) for inner in step["pretokenizers"]]
        return step | {"pretokenizers": inner}
    return step


def _decoder_type(file: _TokenizerJson) -> DecoderType:
    types = {step.get("type", "") for step in (*_steps(file.pre_tokenizer), *_steps(file.decoder))}
    if "ByteLevel" in types:
        return DecoderType.BYTE_LEVEL
    if types & {"Metaspace", "ByteFallback", "Replace"}:
        return DecoderType.SENTENCEPIECE
    raise ValueError(f"its decoder has types {sorted(types)}, which are not supported")


# ---- Special token ids


def _named_ids(folder: ModelFolder, id_of: dict[str, int], size: int) -> dict[str, int]:
    """Ids of bos, eos and so on, from tokenizer_config.json, else from the other files."""
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
    """The valid ids in a value that is an id or a list of ids."""
    ids = value if isinstance(value, list) else [value]
    return [id for id in ids if type(id) is int and 0 <= id < size]


def _adds_bos(folder: ModelFolder, post_processor: Step | None, bos_id: int | None) -> bool:
    """From tokenizer_config.json, else from the post-processor of tokenizer.json."""
    add_bos = folder.tokenizer_config.get("add_bos_token")
    if isinstance(add_bos, bool):
        return add_bos
    for step in _steps(post_processor):
        first = (step.get("single") or [{}])[0].get("SpecialToken")
        if first is not None:
            return bos_id in step["special_tokens"][first["id"]]["ids"]
    return False
