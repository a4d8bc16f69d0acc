"""Turns text into token ids and ids into bytes.  Knows nothing of messages, templates or requests.

The merging is the `tokenizers` library's, the special tokens are ours.  Their text is cut out of
the input first, the longest where several begin at one place, and what lies between is plain text.
So whether "<|im_end|>" is one token or ten characters is decided for each call, and by nobody but
the caller.

A Tokenizer never changes after it is built.  encode() releases the interpreter lock while it merges
and may be called from several threads at once.
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
from llmsrv.text.vocabulary import BLANK
from llmsrv.text.vocabulary import SPECIAL
from llmsrv.text.vocabulary import Spelling
from llmsrv.text.vocabulary import TokenType
from llmsrv.text.vocabulary import VERBATIM
from llmsrv.text.vocabulary import Vocabulary

# Each text is encoded in the thread that asks for it.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Control tokens that end an answer even where the files do not say so.
END_TEXTS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>")
# What stands before a text, between it and its ending, and behind both, for a model to fill in.
FILL_IN_TEXTS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>"),
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
)
# The texts of special tokens, far above any model known: one, and all together.
MAX_SPECIAL_LENGTH = 256
MAX_SPECIAL_TOTAL = 1 << 18
USER_DEFINED = TokenType.USER_DEFINED


def load_tokenizer(model: GGUFFile | ModelFolder, cache_dir: Path | None = None) -> "Tokenizer":
    """The tokenizer of a model file or folder; 0.07 s for 49k tokens in byte-level BPE.

    cache_dir   keeps what is costly to work out in its folder "tokenizers"; None: nothing is kept

    Raises ModelError for what is missing, malformed or of a kind we do not have."""
    try:
        if isinstance(model, ModelFolder):
            return Tokenizer(read_folder(model))
        return Tokenizer(read_gguf(model, cache_dir))
    except ModelError:
        raise
    except Exception as error:  # what the tokenizers library raises is nothing narrower
        raise ModelError(f"{model.path}: its vocabulary is not usable: {error}") from None


class Tokenizer:
    """What encodes and prints a vocabulary.

    vocab_size      ids are 0 <= id < vocab_size
    special_tokens  id of each control token's text; user-defined tokens are not among them
    bos_id          None where the model has none; add_bos says whether a prompt begins with it
    end_ids         any of these ends an answer
    fim_token_ids     as FILL_IN_TEXTS, None where the model has none
    named_tokens    texts under the names that chat templates use, as bos_token and eos_token
    max_token_chars   characters that one id can stand for at most
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._tokens = tokens = vocabulary.tokens
        self._types = types = vocabulary.types
        self.vocab_size = len(tokens)
        self.max_token_chars = max(map(len, tokens))
        self.special_tokens = {t: i for i, t in enumerate(tokens) if t and types[i] in SPECIAL}
        user_defined = {t: i for i, t in enumerate(tokens) if t and types[i] == USER_DEFINED}
        self._id_of = self.special_tokens | user_defined
        _check_lengths(self._id_of)
        self._user_defined = any_of(user_defined)
        self._all_verbatim = any_of(self._id_of)

        ids = vocabulary.named_ids
        self.bos_id = ids.get("bos")
        self.add_bos = vocabulary.add_bos and self.bos_id is not None
        known_ends = {self.special_tokens[t] for t in END_TEXTS if t in self.special_tokens}
        self.end_ids = vocabulary.end_ids | known_ends
        self.named_tokens = {f"{name}_token": tokens[id] for name, id in ids.items()}
        self.fim_token_ids = _fill_in_ids(self._id_of)

    def encode(self, text: str, *, parse_special: bool, is_start: bool = True) -> list[int]:
        """The ids of `text`, without BOS; 0.5 M tokens a second.  A byte that the vocabulary has no
        token for is dropped, as the field's tokenizers do.

        parse_special   whether a control token's text means that token; user-defined tokens are
                        found either way, as they belong to the plain vocabulary
        is_start        False for what follows other text of the same prompt"""
        ids: list[int] = []
        for index, piece in enumerate(self.split(text, parse_special=parse_special)):
            if index % 2:
                ids.append(self._id_of[piece])
            elif piece:
                if self._vocabulary.blank_first and is_start and index == 0:
                    piece = piece if piece[0] in (" ", BLANK) else " " + piece
                ids += self._merged(piece)
        return ids

    def _merged(self, text: str) -> list[int]:
        # A batch of one: the library's encode() keeps the interpreter lock, for 0.1 s at 200 KB.
        merges = self._vocabulary.merges
        encoded: list[int] = merges.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return encoded

    def with_bos(self, ids: list[int]) -> list[int]:
        """A prompt's ids with BOS once where the model wants it, whether its text had it or not."""
        if self.add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids

    def split(self, text: str, *, parse_special: bool) -> list[str]:
        """Plain text and the texts of special tokens in turn; the first and last may be empty.
        White space that a special token swallows is left out."""
        pattern = self._all_verbatim if parse_special else self._user_defined
        pieces = pattern.split(text) if pattern else [text]
        if self._vocabulary.strips_before or self._vocabulary.strips_after:
            for index in range(1, len(pieces), 2):
                if pieces[index] in self._vocabulary.strips_before:
                    pieces[index - 1] = pieces[index - 1].rstrip()
                if pieces[index] in self._vocabulary.strips_after:
                    pieces[index + 1] = pieces[index + 1].lstrip()
        return pieces

    def token_bytes(self, id: int) -> bytes:
        """What the id prints; a special token prints its text.  A token may be half a character."""
        text = self.token_text(id)
        type = self._types[id]
        if type == TokenType.BYTE:
            return bytes([int(text[3:5], 16)])
        if self._vocabulary.spelling is Spelling.SENTENCEPIECE:
            if type not in SPECIAL:
                text = text.replace(BLANK, " ")
        elif type not in VERBATIM:
            try:
                return text.translate(BYTE_OF_CHARACTER).encode("latin-1")
            except UnicodeEncodeError:  # a token with characters that stand for no byte
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

    def is_text(self, id: int) -> bool:
        """Whether the id stands for its bytes: it is no control token, and in use."""
        return self._types[id] not in SPECIAL and self._types[id] != TokenType.UNUSED


def _fill_in_ids(id_of: Mapping[str, int]) -> tuple[int, int, int] | None:
    texts = next((texts for texts in FILL_IN_TEXTS if all(t in id_of for t in texts)), None)
    return (id_of[texts[0]], id_of[texts[1]], id_of[texts[2]]) if texts else None


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
