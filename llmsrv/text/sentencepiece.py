"""Works out the merges of a SentencePiece BPE vocabulary, which has scores in their place.

SentencePiece joins, again and again, the two neighbours whose joint text is the token with the
highest score, the leftmost where scores are equal.  While a token comes into being no merge crosses
its edges, so what happens inside is what happens to its text alone, and of all pairs that spell it
only one is ever joined: the last pair when its text is merged by itself.  These pairs, one a token
in the order of scores, give a BPE with ranked merges the same answers.

For 262k tokens that takes 1.5 s, so the pairs are kept on disk.
Source: SentencePiece, src/bpe_model.cc.
"""

import hashlib
import logging
import os
import sys
import tempfile
from array import array
from collections.abc import Sequence
from pathlib import Path

from llmsrv.text.vocabulary import TokenType

log = logging.getLogger(__name__)

# Merging a token by itself takes the square of its length.  Gemma: 16 characters, 11 M squares.
MAX_TOKEN_LENGTH = 256
MAX_SQUARES = 1 << 27
DIGEST_BYTES = 32
Pair = tuple[str, str]


def cached_merges(
    tokens: Sequence[str], types: Sequence[float], scores: Sequence[float], cache_dir: Path | None
) -> list[Pair]:
    """The pairs to join, the first ones first; from cache_dir/tokenizers when they are there.

    Raises ValueError when the tokens are longer than any model's."""
    if cache_dir is None:
        return merges_from_scores(tokens, types, scores)
    path = cache_dir / "tokenizers" / f"{_key(tokens, types, scores)}.merges"
    found = _read(path, tokens)
    if found is None:
        found = merges_from_scores(tokens, types, scores)
        _write(path, found, tokens)
    return found


def merges_from_scores(
    tokens: Sequence[str], types: Sequence[float], scores: Sequence[float]
) -> list[Pair]:
    """The pairs to join, the first ones first.  Only plain tokens are joined and come of it."""
    plain = [id for id, type in enumerate(types) if type == TokenType.NORMAL]
    _check_lengths([len(tokens[id]) for id in plain])
    plain.sort(key=lambda id: -scores[id])
    ranks = {tokens[id]: rank for rank, id in enumerate(plain)}
    pairs = (_last_pair(tokens[id], ranks) for id in plain)
    return [pair for pair in pairs if pair is not None]


def _check_lengths(lengths: list[int]) -> None:
    longest, squares = max(lengths, default=0), sum(length * length for length in lengths)
    if longest > MAX_TOKEN_LENGTH or squares > MAX_SQUARES:
        raise ValueError(
            f"its tokens have up to {longest} characters, {sum(lengths)} together; at most "
            f"{MAX_TOKEN_LENGTH} each are possible, and {MAX_SQUARES} as the sum of the squares"
        )


def _last_pair(text: str, ranks: dict[str, int]) -> Pair | None:
    """The two tokens that become `text` when it is merged by itself; None when it never does."""
    parts = list(text)
    never = len(ranks)
    while len(parts) > 2:
        best_rank, best = never, 0
        left = parts[0]
        for index in range(1, len(parts)):
            right = parts[index]
            rank = ranks.get(left + right, never)
            if rank < best_rank:
                best_rank, best = rank, index
            left = right
        if not best:
            return None
        parts[best - 1 : best + 1] = [parts[best - 1] + parts[best]]
    if len(parts) == 2 and parts[0] in ranks and parts[1] in ranks:
        return parts[0], parts[1]
    return None


# ---- On disk: the SHA-256 of the rest, then the ids of each pair as little-endian uint32


def _key(tokens: Sequence[str], types: Sequence[float], scores: Sequence[float]) -> str:
    digest = hashlib.sha256("".join(tokens).encode("utf-8", "surrogateescape"))
    for numbers in (map(len, tokens), types, scores):
        digest.update(array("d", numbers).tobytes())
    return digest.hexdigest()


def _read(path: Path, tokens: Sequence[str]) -> list[Pair] | None:
    """None when there is no such file, or it is damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    ids = array("I")
    if hashlib.sha256(data[DIGEST_BYTES:]).digest() != data[:DIGEST_BYTES]:
        log.warning("%s is damaged; it is made anew", path)
        return None
    ids.frombytes(data[DIGEST_BYTES:])
    if sys.byteorder == "big":
        ids.byteswap()
    texts = map(tokens.__getitem__, ids)
    return list(zip(texts, texts))


def _write(path: Path, pairs: list[Pair], tokens: Sequence[str]) -> None:
    """Puts the file in its place, whole or not at all; without a place for it, the next start takes
    as long as this one."""
    id_of = {text: id for id, text in enumerate(tokens)}
    ids = array("I", [id_of[text] for pair in pairs for text in pair])
    if sys.byteorder == "big":
        ids.byteswap()
    payload = ids.tobytes()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, part = tempfile.mkstemp(dir=path.parent)
        try:
            with open(descriptor, "wb") as file:
                file.write(hashlib.sha256(payload).digest() + payload)
            os.replace(part, path)
        except OSError:
            os.unlink(part)
            raise
    except OSError as error:
        log.warning("cannot keep the converted tokenizer in %s: %s", path.parent, error.strerror)
