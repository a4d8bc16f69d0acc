"""A small SentencePiece vocabulary as GGUF metadata, and merging done the slow and plain way."""

import random
from collections.abc import Mapping

UNKNOWN, CONTROL, NORMAL, USER_DEFINED, BYTE = 2, 3, 1, 4, 6
SPECIALS = ("<unk>", "<s>", "</s>")
FIRST_BYTE = len(SPECIALS)
LETTERS = "▁abcdeé東.,"
USER_DEFINED_TEXTS = ("\n", "\n\n", "<b>")


def merged_tokens(count: int = 120, seed: int = 0) -> list[str]:
    """Texts of two letters and more, each the join of two before it or of letters."""
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
    letters, and user-defined tokens; as in Llama 2, a blank is put before the text."""
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


def merged_plainly(text: str, score_of: Mapping[str, float]) -> list[str]:
    """What SentencePiece's BPE makes of a text: again and again the best pair, the leftmost of
    equals, is joined."""
    parts = list(text)
    while True:
        pairs = [a + b for a, b in zip(parts, parts[1:])]
        joined = [(score_of[pair], -i) for i, pair in enumerate(pairs) if pair in score_of]
        if not joined:
            return parts
        at = -max(joined)[1]
        parts[at : at + 2] = [pairs[at]]
