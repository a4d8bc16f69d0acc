"""A small SentencePiece vocabulary as GGUF metadata, and a slow, plain merging algorithm."""

import random
from collections.abc import Mapping
from pathlib import Path

from llmsrv.files.gguf import GGUFFile
from llmsrv.files.gguf import open_gguf
from llmsrv.text.tokenizer import Tokenizer
from tests.support.gguf_writer import write_gguf

UNKNOWN, CONTROL, NORMAL, USER_DEFINED, BYTE = 2, 3, 1, 4, 6
SPECIALS = ("<unk>", "<s>", "</s>")
FIRST_BYTE = len(SPECIALS)
LETTERS = "▁abcdeé東.,"
USER_DEFINED_TEXTS = ("\n", "\n\n", "<b>")


def merged_tokens(count: int = 120, seed: int = 0) -> list[str]:
    """Texts of at least two letters, each joined from letters or earlier texts."""
    rng = random.Random(seed)
    parts, found = list(LETTERS), []
    while len(found) < count:
        text = rng.choice(parts) + rng.choice(parts)
        if text not in found and len(text) <= 12:
            found.append(text)
            parts.append(text)
    return found


def sentencepiece_vocabulary() -> dict[str, object]:
    """tokenizer.* metadata: <unk>, <s>, </s>, the 256 bytes, merged tokens with falling scores, the
    letters, and user-defined tokens.  As in Llama 2, a space is put before the text."""
    merged = merged_tokens()
    normal = [*merged, *LETTERS]
    tokens = [
        *SPECIALS,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *normal,
        *USER_DEFINED_TEXTS,
    ]
    types = [UNKNOWN, CONTROL, CONTROL]
    types += [BYTE] * 256 + [NORMAL] * len(normal) + [USER_DEFINED] * len(USER_DEFINED_TEXTS)
    first_normal = FIRST_BYTE + 256
    scores = [0.0] * first_normal + [-float(n) for n in range(len(tokens) - first_normal)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def merge_plainly(text: str, score_of: Mapping[str, float]) -> list[str]:
    """Merges a text as SentencePiece BPE does: joins the best pair repeatedly, the leftmost if
    scores are equal."""
    parts = list(text)
    while True:
        pairs = [a + b for a, b in zip(parts, parts[1:])]
        joined = [(score_of[pair], -i) for i, pair in enumerate(pairs) if pair in score_of]
        if not joined:
            return parts
        at = -max(joined)[1]
        parts[at : at + 2] = [pairs[at]]


def small_file(path: Path, **changes: object) -> GGUFFile:
    replaced = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    metadata = sentencepiece_vocabulary() | replaced
    present = {key: value for key, value in metadata.items() if value is not None}
    return open_gguf(write_gguf(path, present))


def texts(tokenizer: Tokenizer, text: str, parse_special: bool = True) -> list[str]:
    ids = tokenizer.encode(text, parse_special=parse_special)
    return [tokenizer.token_text(id) for id in ids]


def printed(tokenizer: Tokenizer, ids: list[int]) -> str:
    return b"".join(map(tokenizer.token_bytes, ids)).decode()
