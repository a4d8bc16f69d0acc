"""What a model's files say about its tokens, whatever the kind of file: facts, with which a
Tokenizer works."""

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from enum import IntEnum

import tokenizers

BLANK = "\u2581"  # as SentencePiece writes " "


class TokenType(IntEnum):
    """tokenizer.ggml.token_type; what is none of these is plain text."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


SPECIAL = frozenset((TokenType.CONTROL, TokenType.UNKNOWN))
# The vocabulary has their texts as they are printed.
VERBATIM = SPECIAL | {TokenType.USER_DEFINED, TokenType.UNUSED}


class Spelling(Enum):
    """How a vocabulary writes the bytes of its plain tokens."""

    BYTE_LEVEL = "each byte as one printable character"
    SENTENCEPIECE = "text, with U+2581 for a blank"


@dataclass(frozen=True)
class Vocabulary:
    """Tokens and merges.

    merges        encodes plain text; knows nothing of special tokens
    tokens        the text of each id, as the files write it
    types         the TokenType of each id; a BYTE's text is as <0x41>
    named_ids     the ids of bos, eos, unk and so on
    end_ids       those that end an answer, as far as the files say
    add_bos       whether a prompt begins with BOS
    blank_first   whether text at the very beginning is encoded with a blank before it
    strips_before, strips_after   tokens that swallow the white space on that side of them
    """

    merges: tokenizers.Tokenizer
    tokens: Sequence[str]
    types: Sequence[float]
    spelling: Spelling
    named_ids: Mapping[str, int]
    end_ids: frozenset[int]
    add_bos: bool
    blank_first: bool = False
    strips_before: frozenset[str] = frozenset()
    strips_after: frozenset[str] = frozenset()
