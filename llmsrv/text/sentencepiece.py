"""Computes the merges of a SentencePiece BPE vocabulary, which has scores instead of merges.

SentencePiece repeatedly joins the two neighbours whose joined text is the token with the highest
score, the leftmost if scores are equal.  While a token is being formed, no merge crosses its edges.
So the merges inside it are the same as when its text is merged alone, and of all pairs that spell
the token only one is ever joined: the last pair when its text is merged alone.  These pairs, one
per token, in the order of scores, give a BPE with ranked merges the same results.

For 262k tokens this takes 1.5 s, so the pairs are cached on disk.
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

# Merging a token alone takes time quadratic in its length.  Gemma: at most 16 characters, 11 M as
# the sum of squares.
MAX_TOKEN_CHARS = 256
MAX_SQUARES = 1 << 27
DIGEST_BYTES = 32
Pair = tuple[str, str]


def cached_merges(
    tokens: Sequence[str], types: Sequence[float], scores: Sequence[float], cache_dir: Path | None
) -> list[Pair]:
    """Returns the pairs to join in order of rank, from cache_dir/tokenizers if they are there.

    Raises ValueError if the tokens are longer than those of any known model."""
    if cache_dir is None:
        return merges_from_scores(tokens, types, scores)
    path = cache_dir / "tokenizers" / f"{_cache_key(tokens, types, scores)}.merges"
    found = _read(path, tokens)
    if found is None:
        found = merges_from_scores(tokens, types, scores)
        _write(path, found, tokens)
    return found


def merges_from_scores(
    tokens: Sequence[str], types: Sequence[float], scores: Sequence[float]
) -> list[Pair]:
    """Computes the pairs to join in order of rank.  Only plain tokens take part in merges."""
    plain = [id for id, type in enumerate(types) if type == TokenType.NORMAL]
    _check_lengths([len(tokens[id]) for id in plain])
    plain.sort(key=lambda id: -scores[id])
    ranks = {tokens[id]: rank for rank, id in enumerate(plain)}
    pairs = (_last_pair(tokens[id], ranks) for id in plain)
    return [pair for pair in pairs if pair is not None]


def _check_lengths(lengths: list[int]) -> None:
    longest, squares = max(lengths, default=0), sum(length * length for length in lengths)
    if longest > MAX_TOKEN_CHARS or squares > MAX_SQUARES:
        raise ValueError(
            f"its tokens have up to {longest} characters, {sum(lengths)} in total; the limit is "
            f"{MAX_TOKEN_CHARS} each, and {MAX_SQUARES} for the sum of the squares"
        )


def _last_pair(text: str, ranks: dict[str, int]) -> Pair | None:
    """The pair that is joined last when `text` is merged alone; None if it never merges."""
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


# ---- File format: the SHA-256 of the rest, then the ids of each pair as little-endian uint32


def _cache_key(tokens: Sequence[str], types: Sequence[float], scores: Sequence[float]) -> str:
    digest = hashlib.sha256("".join(tokens).encode("utf-8", "surrogateescape"))
    for numbers in (map(len, tokens), types, scores):
        digest.update(array("d", numbers).tobytes())
    return digest.hexdigest()


def _read(path: Path, tokens: Sequence[str]) -> list[Pair] | None:
    """Reads the cached pairs; None if there is no such file or it is damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    ids = array("I")
    if hashlib.sha256(data[DIGEST_BYTES:]).digest() != data[:DIGEST_BYTES]:
        log.warning("%s is damaged; writing it again", path)
        return None
    ids.frombytes(data[DIGEST_BYTES:])
    if sys.byteorder == "big":
        ids.byteswap()
    texts = map(tokens.__getitem__, ids)
    return list(zip(texts, texts))


def _write(path: Path, pairs: list[Pair], tokens: Sequence[str]) -> None:
    """Writes the file completely or not at all.  If it cannot be written, the next start will take
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
        log.warning("cannot cache the converted tokenizer in %s: %s", path.parent, error.strerror)
