"""Turns text into token ids and ids into bytes.  Knows nothing of messages, templates or requests.

The `tokenizers` library merges plain text; we handle special tokens.  Their texts are first cut out
of the input, the longest if several begin at the same place, and the rest is plain text.  So the
caller alone decides, for each call, whether "<|im_end|>" is one token or ten characters.

A Tokenizer is immutable.  encode() releases the interpreter lock while merging and may be called
from several threads at once.
"""

import os
import re
from collections.abc import Collection
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path

from llmsrv.errors import ModelError
from llmsrv.files.folder import ModelFolder
from llmsrv.files.gguf import GGUFFile
from llmsrv.text.folder_vocabulary import read_folder
from llmsrv.text.gguf_vocabulary import read_gguf
from llmsrv.text.vocabulary import END_TOKEN_TEXTS
from llmsrv.text.vocabulary import METASPACE
from llmsrv.text.vocabulary import SPECIAL_TYPES
from llmsrv.text.vocabulary import DecoderType
from llmsrv.text.vocabulary import TokenType
from llmsrv.text.vocabulary import VERBATIM_TYPES
from llmsrv.text.vocabulary import Vocabulary

# Each text is encoded on the calling thread.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Fill-in-the-middle tokens: before the prefix, before the suffix, and before the middle, which the
# model writes.
FIM_TEXTS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>"),
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
)
# Limits for the texts of special tokens, far above any known model: each, and in total.
MAX_SPECIAL_CHARS = 256
MAX_SPECIAL_CHARS_TOTAL = 1 << 18
USER_DEFINED = TokenType.USER_DEFINED


def load_tokenizer(model: GGUFFile | ModelFolder, cache_dir: Path | None = None) -> "Tokenizer":
    """Loads the tokenizer of a model file or folder; takes 0.07 s for 49k tokens in byte-level BPE.

    cache_dir   expensive results are cached in its folder "tokenizers"; None: no cache

    Raises ModelError if something is missing, malformed or not supported."""
    try:
        if isinstance(model, ModelFolder):
            return Tokenizer(read_folder(model))
        return Tokenizer(read_gguf(model, cache_dir))
    except ModelError:
        raise
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ModelError(f"{model.path}: its vocabulary is not usable: {error}") from None


class Tokenizer:
    """Encodes and decodes with a vocabulary.

    vocab_size       ids are 0 <= id < vocab_size
    special_tokens   text -> id of each control token; user-defined tokens are not included
    bos_id           None if the model has none
    add_bos          whether a prompt begins with BOS
    end_ids          any of these ends an answer
    fim_token_ids    in the order of FIM_TEXTS; None if the model has none
    named_tokens     texts under the names that chat templates use, such as bos_token
    max_token_chars  length of the longest token, in characters
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._tokens = tokens = vocabulary.tokens
        self._types = types = vocabulary.types
        self.vocab_size = len(tokens)
        self.max_token_chars = max(map(len, tokens))
        self.special_tokens = {
            t: i for i, t in enumerate(tokens) if t and types[i] in SPECIAL_TYPES
        }
        user_defined = {t: i for i, t in enumerate(tokens) if t and types[i] == USER_DEFINED}
        self._id_of = self.special_tokens | user_defined
        _check_lengths(self._id_of)
        self._user_defined = longest_match_pattern(user_defined)
        self._all_verbatim = longest_match_pattern(self._id_of)

        ids = vocabulary.named_ids
        self.bos_id = ids.get("bos")
        self.add_bos = vocabulary.add_bos and self.bos_id is not None
        known_ends = {self.special_tokens[t] for t in END_TOKEN_TEXTS if t in self.special_tokens}
        self.end_ids = vocabulary.end_ids | known_ends
        self.named_tokens = {f"{name}_token": tokens[id] for name, id in ids.items()}
        self.fim_token_ids = _fim_token_ids(self._id_of)

    def encode(self, text: str, *, parse_special: bool, is_start: bool = True) -> list[int]:
        """Returns the ids of `text`, without BOS; 0.5 M tokens per second.  Bytes without a token
        are dropped, as in other tokenizers.

        parse_special   whether the text of a control token means that token; user-defined tokens
                        are always found, since they belong to the plain vocabulary
        is_start        False if other text of the same prompt precedes `text`"""
        ids: list[int] = []
        for index, piece in enumerate(self.split(text, parse_special=parse_special)):
            if index % 2:
                ids.append(self._id_of[piece])
            elif piece:
                if self._vocabulary.prepends_space and is_start and index == 0:
                    piece = piece if piece[0] in (" ", METASPACE) else " " + piece
                ids += self._encode_plain(piece)
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        # A batch of one, because encode() holds the interpreter lock: for 0.1 s at 200 KB.
        bpe = self._vocabulary.bpe
        encoded: list[int] = bpe.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return encoded

    def with_bos(self, ids: list[int]) -> list[int]:
        """Puts BOS before a prompt's ids if the model wants it and it is not already there."""
        if self.add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids

    def split(self, text: str, *, parse_special: bool) -> list[str]:
        """Returns plain text and texts of special tokens alternately.

        The first and the last piece are plain text, which may be empty.  Whitespace that a special
        token strips is left out."""
        pattern = self._all_verbatim if parse_special else self._user_defined
        pieces = pattern.split(text) if pattern else [text]
        if self._vocabulary.lstrip_tokens or self._vocabulary.rstrip_tokens:
            for index in range(1, len(pieces), 2):
                if pieces[index] in self._vocabulary.lstrip_tokens:
                    pieces[index - 1] = pieces[index - 1].rstrip()
                if pieces[index] in self._vocabulary.rstrip_tokens:
                    pieces[index + 1] = pieces[index + 1].lstrip()
        return pieces

    def token_bytes(self, id: int) -> bytes:
        """The bytes of an id; for a special token, its text.  May be part of a character."""
        text = self.token_text(id)
        type = self._types[id]
        if type == TokenType.BYTE:
            return bytes([int(text[3:5], 16)])
        if self._vocabulary.decoder is DecoderType.SENTENCEPIECE:
            if type not in SPECIAL_TYPES:
                text = text.replace(METASPACE, " ")
        elif type not in VERBATIM_TYPES:
            try:
                return text.translate(BYTE_OF_CHARACTER).encode("latin-1")
            except UnicodeEncodeError:  # a token with characters outside the byte alphabet
                pass
        return text.encode("utf-8", "surrogateescape")

    def token_text(self, id: int) -> str:
        """The token as the vocabulary writes it; byte-level BPE writes a space as "Ġ"."""
        if not 0 <= id < self.vocab_size:
            raise IndexError(f"token id {id} is outside the vocabulary of {self.vocab_size}")
        return self._tokens[id]

    def is_special(self, id: int) -> bool:
        """True for a control token, which is hidden from users by default."""
        return self._types[id] in SPECIAL_TYPES

    def is_text(self, id: int) -> bool:
        """True for a token that is plain text: neither a control token nor unused."""
        return self._types[id] not in SPECIAL_TYPES and self._types[id] != TokenType.UNUSED


def _fim_token_ids(id_of: Mapping[str, int]) -> tuple[int, int, int] | None:
    texts = next((texts for texts in FIM_TEXTS if all(t in id_of for t in texts)), None)
    return (id_of[texts[0]], id_of[texts[1]], id_of[texts[2]]) if texts else None


def _check_lengths(texts: Collection[str]) -> None:
    longest, total = max(map(len, texts), default=0), sum(map(len, texts))
    if longest > MAX_SPECIAL_CHARS or total > MAX_SPECIAL_CHARS_TOTAL:
        raise ValueError(
            f"its special tokens have up to {longest} characters, {total} in total; the "
            f"limits are {MAX_SPECIAL_CHARS} and {MAX_SPECIAL_CHARS_TOTAL}"
        )


def label_special(pieces: Iterable[str]) -> Iterable[tuple[bool, str]]:
    """Pairs each piece of Tokenizer.split with whether it is a special token."""
    for index, piece in enumerate(pieces):
        yield index % 2 == 1, piece


def longest_match_pattern(texts: Collection[str]) -> re.Pattern[str] | None:
    """A pattern that captures the leftmost, then longest, of `texts`; None if there are none.

    A plain alternation would try every text at every "<".  As a prefix tree, each character of the
    input costs at most as many steps as the longest text has characters, however many texts there
    are."""
    return re.compile(f"({_tree_pattern(sorted(texts))})") if texts else None


def _tree_pattern(texts: Sequence[str]) -> str:
    """A pattern for sorted, distinct texts, with one branch for each common prefix."""
    ends_here = texts[0] == ""
    branches = []
    start = 1 if ends_here else 0
    while start < len(texts):
        stop = start + 1
        while stop < len(texts) and texts[stop][0] == texts[start][0]:
            stop += 1
        shared = _common_prefix_length(texts[start], texts[stop - 1])
        rest = _tree_pattern([text[shared:] for text in texts[start:stop]])
        branches.append(re.escape(texts[start][:shared]) + rest)
        start = stop
    if not branches:
        return ""
    return f"(?:{'|'.join(branches)}){'?' if ends_here else ''}"


def _common_prefix_length(first: str, last: str) -> int:
    """Length of the common prefix; for the first and last of sorted texts, that of all."""
    length = 0
    for a, b in zip(first, last):
        if a != b:
            break
        length += 1
    return length


def _byte_of_character() -> dict[int, int]:
    """Maps the characters of byte-level BPE to bytes: the printable ones of Latin-1 to themselves,
    256 and up to the other bytes in order.  Source: GPT-2's encoder.py."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: byte for byte in printable} | {256 + i: byte for i, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_of_character()
