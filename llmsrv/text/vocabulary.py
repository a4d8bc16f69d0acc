"""The vocabulary that a Tokenizer works with, independent of the file format it was read from."""

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from enum import IntEnum

import tokenizers

METASPACE = "\u2581"  # SentencePiece writes " " like this

# Control tokens that end an answer even if the files do not say so.
# Source: llama.cpp, src/llama-vocab.cpp.
END_TOKEN_TEXTS = frozenset(
    (
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<end_of_turn>",
        "<end_of_utterance>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    )
)


class TokenType(IntEnum):
    """tokenizer.ggml.token_type; any other value means plain text."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


SPECIAL_TYPES = frozenset((TokenType.CONTROL, TokenType.UNKNOWN))
# The vocabulary stores the texts of these types as they are printed.
VERBATIM_TYPES = SPECIAL_TYPES | {TokenType.USER_DEFINED, TokenType.UNUSED}


class DecoderType(Enum):
    """How the texts of plain tokens are decoded to bytes."""

    BYTE_LEVEL = "each byte as one printable character"
    SENTENCEPIECE = "text, with U+2581 for a space"


@dataclass(frozen=True)
class Vocabulary:
    """Tokens and merges.

    bpe             encodes plain text; knows nothing of special tokens
    tokens          the text of each id, as in the files
    types           the TokenType of each id; the text of a BYTE looks like <0x41>
    named_ids       the ids of bos, eos, unk and so on
    end_ids         ids that end an answer according to the files
    add_bos         whether a prompt begins with BOS
    prepends_space  whether text at the very beginning is encoded with a space before it
    lstrip_tokens   tokens that strip the whitespace to their left
    rstrip_tokens   tokens that strip the whitespace to their right
    """

    bpe: tokenizers.Tokenizer
    tokens: Sequence[str]
    types: Sequence[float]
    decoder: DecoderType
    named_ids: Mapping[str, int]
    end_ids: frozenset[int]
    add_bos: bool
    prepends_space: bool = False
    lstrip_tokens: frozenset[str] = frozenset()
    rstrip_tokens: frozenset[str] = frozenset()
