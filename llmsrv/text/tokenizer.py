"""Turns text into token ids and ids into bytes, from a GGUF file's vocabulary.  Knows nothing of
messages, templates or requests.

Byte-level BPE (tokenizer.ggml.model "gpt2"): the merging is the `tokenizers` library's, the special
tokens are ours.  Their text is cut out of the input first, the longest where several begin at one
place, and what lies between is plain text.  So whether "<|im_end|>" is one token or ten characters
is decided for each call, and by nobody but the caller.

A Tokenizer never changes after it is built.  encode() releases the interpreter lock while it merges
and may be called from several threads at once.
"""

import logging
import re
from collections.abc import Collection
from collections.abc import Iterable
from collections.abc import Sequence
from enum import IntEnum

import tokenizers
from tokenizers.models import BPE

from llmsrv.errors import ModelError
from llmsrv.files.gguf import GGUFFile
from llmsrv.text.pre_tokenizers import PRE_TOKENIZERS
from llmsrv.text.pre_tokenizers import PreTokenizer

log = logging.getLogger(__name__)

# Control tokens that end an answer even where the file's metadata do not say so.
END_TEXTS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>")
# The texts of special tokens, far above any model known: one, and all together.
MAX_SPECIAL_LENGTH = 256
MAX_SPECIAL_TOTAL = 1 << 18


class TokenType(IntEnum):
    """tokenizer.ggml.token_type; what is none of these is plain text."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5


SPECIAL = (TokenType.CONTROL, TokenType.UNKNOWN)
# What is not cut into bytes: the vocabulary has these texts as they stand.
VERBATIM = (*SPECIAL, TokenType.USER_DEFINED, TokenType.UNUSED)


class Tokenizer:
    """A vocabulary with its merges.

    vocab_size      ids are 0 <= id < vocab_size
    special_tokens  id of each control token's text; user-defined tokens are not among them
    bos_id          None where the model has none; add_bos says whether a prompt begins with it
    end_ids         any of these ends an answer
    named_tokens    texts under the names that chat templates use, as bos_token and eos_token
    longest_token   characters that one id can stand for at most
    """

    def __init__(
        self,
        merges: tokenizers.Tokenizer,
        tokens: Sequence[str],
        types: Sequence[int],
        *,
        ids: dict[str, int],
        add_bos: bool,
    ) -> None:
        self._merges = merges
        self._tokens = tokens
        self._types = types
        self.vocab_size = len(tokens)
        self.longest_token = max(map(len, tokens))
        self.special_tokens = {t: i for i, t in enumerate(tokens) if types[i] in SPECIAL}
        user_defined = {t: i for i, t in enumerate(tokens) if types[i] == TokenType.USER_DEFINED}
        self._id_of = self.special_tokens | user_defined
        _check_lengths(self._id_of)
        self._user_defined = any_of(user_defined)
        self._all_verbatim = any_of(self._id_of)

        self.bos_id = ids.get("bos")
        self.add_bos = add_bos and self.bos_id is not None
        ends = {ids[name] for name in ("eos", "eot", "eom") if name in ids}
        ends.update(self.special_tokens[t] for t in END_TEXTS if t in self.special_tokens)
        self.end_ids = frozenset(ends)
        self.named_tokens = {f"{name}_token": tokens[id] for name, id in ids.items()}

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        """The ids of `text`, without BOS; 0.5 M tokens a second.  A byte that the vocabulary has no
        token for is dropped, as the field's tokenizers do.

        parse_special   whether a control token's text means that token; user-defined tokens are
                        found either way, as they belong to the plain vocabulary"""
        ids: list[int] = []
        for is_special, piece in alternate(self.split(text, parse_special=parse_special)):
            if is_special:
                ids.append(self._id_of[piece])
            elif piece:
                ids += self._merges.encode(piece, add_special_tokens=False).ids
        return ids

    def with_bos(self, ids: list[int]) -> list[int]:
        """A prompt's ids with BOS once where the model wants it, whether its text had it or not."""
        if self.add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids

    def split(self, text: str, *, parse_special: bool) -> list[str]:
        """Plain text and the texts of special tokens in turn; the first and last may be empty."""
        pattern = self._all_verbatim if parse_special else self._user_defined
        return pattern.split(text) if pattern else [text]

    def token_bytes(self, id: int) -> bytes:
        """What the id prints; a special token prints its text.  A token may be half a character."""
        text = self.token_text(id)
        if self._types[id] not in VERBATIM:
            try:
                return text.translate(BYTE_OF_CHARACTER).encode("latin-1")
            except UnicodeEncodeError:  # a vocabulary with stray characters that stand for no byte
                pass
        return text.encode("utf-8", "surrogateescape")

    def token_text(self, id: int) -> str:
        """The vocabulary's own spelling, where byte-level BPE writes a blank as "Ġ"."""
        if not 0 <= id < self.vocab_size:
            raise IndexError(f"token id {id} is outside the vocabulary of {self.vocab_size}")
        return self._tokens[id]

    def is_special(self, id: int) -> bool:
        """Whether the id is a control token, which readers are not shown."""
        return self._types[id] in SPECIAL


def _check_lengths(texts: Collection[str]) -> None:
    longest, total = max(map(len, texts), default=0), sum(map(len, texts))
    if longest > MAX_SPECIAL_LENGTH or total > MAX_SPECIAL_TOTAL:
        raise ValueError(
            f"its special tokens have up to {longest} characters, {total} together; at most "
            f"{MAX_SPECIAL_LENGTH} and {MAX_SPECIAL_TOTAL} are possible"
        )


def alternate(pieces: Iterable[str]) -> Iterable[tuple[bool, str]]:
    """Tokenizer.split's pieces, each with whether it is a special token."""
    for index, piece in enumerate(pieces):
        yield index % 2 == 1, piece


def any_of(texts: Collection[str]) -> re.Pattern[str] | None:
    """Finds the leftmost, then longest, of `texts` and captures it; None where there are none.

    A plain alternation tries every text at every "<"; folded into a tree, a character of the input
    costs at most one step for each of the longest text, however many there are."""
    return re.compile(f"({_tree_pattern(sorted(texts))})") if texts else None


def _tree_pattern(texts: Sequence[str]) -> str:
    """A pattern for sorted, distinct texts, those with a common beginning under one branch."""
    ends_here = texts[0] == ""
    branches = []
    start = 1 if ends_here else 0
    while start < len(texts):
        stop = start + 1
        while stop < len(texts) and texts[stop][0] == texts[start][0]:
            stop += 1
        shared = _shared_length(texts[start], texts[stop - 1])
        rest = _tree_pattern([text[shared:] for text in texts[start:stop]])
        branches.append(re.escape(texts[start][:shared]) + rest)
        start = stop
    if not branches:
        return ""
    return f"(?:{'|'.join(branches)}){'?' if ends_here else ''}"


def _shared_length(first: str, last: str) -> int:
    """Of sorted texts, the first and the last share what all of them share."""
    length = 0
    for a, b in zip(first, last):
        if a != b:
            break
        length += 1
    return length


def _byte_of_character() -> dict[int, int]:
    """The characters by which byte-level BPE writes bytes: printable ones of Latin-1 stand for
    themselves, the others for 256 and up in turn.  Source: GPT-2's encoder.py."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: byte for byte in printable} | {256 + i: byte for i, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_of_character()


# ---- From a file


def load_tokenizer(gguf: GGUFFile) -> Tokenizer:
    """Builds the tokenizer that a GGUF file describes; 0.07 s for 49k tokens.

    Raises ModelError for what is missing, malformed or of a kind we do not have."""
    model = gguf.get("tokenizer.ggml.model", str)
    if model != "gpt2":
        raise ModelError(
            f"{gguf.path}: its tokenizer is of the kind {model!r}; only byte-level BPE ('gpt2') is "
            "supported yet"
        )
    tokens = _strings(gguf, "tokenizer.ggml.tokens")
    types = _token_types(gguf, len(tokens))
    pre_tokenizer = _pre_tokenizer(gguf)
    add_bos = gguf.get("tokenizer.ggml.add_bos_token", bool)
    try:
        return Tokenizer(
            _merges(tokens, _strings(gguf, "tokenizer.ggml.merges"), pre_tokenizer),
            tokens,
            types,
            ids=_named_ids(gguf, len(tokens)),
            add_bos=pre_tokenizer.add_bos if add_bos is None else add_bos,
        )
    except Exception as error:  # what the library raises is nothing narrower
        raise ModelError(f"{gguf.path}: its vocabulary is not usable: {error}") from None


def _merges(
    tokens: list[str], merges: list[str], pre_tokenizer: PreTokenizer
) -> tokenizers.Tokenizer:
    vocabulary = {text: id for id, text in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        raise ValueError(f"{len(tokens) - len(vocabulary)} tokens are there twice")
    pairs = [merge.partition(" ")[::2] for merge in merges]
    bpe = BPE(vocabulary, pairs, ignore_merges=pre_tokenizer.whole_words)
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizer.build()
    return tokenizer


def _pre_tokenizer(gguf: GGUFFile) -> PreTokenizer:
    name = gguf.get("tokenizer.ggml.pre", str)
    if name is None:
        log.warning("%s names no pre-tokenizer; taking 'default', which may be wrong", gguf.path)
        name = "default"
    if name not in PRE_TOKENIZERS:
        raise ModelError(
            f"{gguf.path}: its pre-tokenizer {name!r} (tokenizer.ggml.pre) is not known; known: "
            f"{', '.join(sorted(PRE_TOKENIZERS))}"
        )
    return PRE_TOKENIZERS[name]


def _strings(gguf: GGUFFile, key: str) -> list[str]:
    strings = gguf.get(key, list)
    if not strings or not isinstance(strings[0], str):
        raise ModelError(f"{gguf.path}: key '{key}' must be an array of strings")
    return strings


def _token_types(gguf: GGUFFile, count: int) -> Sequence[int]:
    key = "tokenizer.ggml.token_type"
    types = gguf.metadata.get(key, [TokenType.NORMAL] * count)
    if not isinstance(types, Sequence) or len(types) != count or isinstance(types, str):
        raise ModelError(f"{gguf.path}: key '{key}' must be an array of {count} numbers")
    return types


def _named_ids(gguf: GGUFFile, count: int) -> dict[str, int]:
    """The ids that metadata give to bos, eos and so on; one outside the vocabulary is ignored."""
    keys = {
        "bos": "tokenizer.ggml.bos_token_id",
        "eos": "tokenizer.ggml.eos_token_id",
        "eot": "tokenizer.ggml.eot_token_id",
        "eom": "tokenizer.ggml.eom_token_id",
        "unk": "tokenizer.ggml.unknown_token_id",
        "pad": "tokenizer.ggml.padding_token_id",
    }
    found = {name: id for name, key in keys.items() if (id := gguf.get(key, int)) is not None}
    for name, id in found.items():
        if not 0 <= id < count:
            log.warning("%s: %s %d is outside its %d tokens", gguf.path, keys[name], id, count)
    return {name: id for name, id in found.items() if 0 <= id < count}
