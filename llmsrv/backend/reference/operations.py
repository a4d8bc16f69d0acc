"""The arithmetic of the reference backend, as functions of numpy arrays that know nothing of plans.

T is the number of rows, of any sequences.  Arrays are float32 unless a docstring says otherwise.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llmsrv.backend.arrays import Array
from llmsrv.backend.arrays import Floats
from llmsrv.backend.base import Batch
from llmsrv.backend.program import Attention
from llmsrv.backend.program import RopeAndStore

# Rows of a long chunk that attend together.  Few, since each row computes scores up to the position
# of the last, and the scores should stay in the CPU's cache.  Not too few, since every span gathers
# k and v.
SPAN_ROWS = 128


def norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """RMSNorm over the last axis, which is as long as weight."""
    mean_square = np.square(x).mean(axis=-1, keepdims=True)
    normed: Floats = x / np.sqrt(mean_square + np.float32(eps)) * weight
    return normed


def gated(x: Floats, function: str) -> Floats:
    """f(gate) * up for x [T, 2 * width], gate and up side by side."""
    gate, up = np.split(x, 2, axis=1)
    return silu(gate) * up if function == "silu" else gelu(gate) * up


def silu(x: Floats) -> Floats:
    activated: Floats = x / (1 + np.exp(-x))
    return activated


def gelu(x: Floats) -> Floats:
    """The approximation by tanh.  Source: Hendrycks & Gimpel 2016, section 2."""
    inner = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x * x * x)
    activated: Floats = np.float32(0.5) * x * (1 + np.tanh(inner))
    return activated


def softcapped(x: Floats, cap: float) -> Floats:
    capped: Floats = np.float32(cap) * np.tanh(x / np.float32(cap))
    return capped


# ---- Rope


def rotate_heads(heads: Floats, operation: RopeAndStore, batch: Batch) -> None:
    """Rotates heads [T, heads, head_dim] in place, each row by its position."""
    if operation.frequencies is None:
        return
    frequencies = operation.frequencies  # [rotary_dim / 2], or [T, rotary_dim / 2]
    if operation.long_frequencies is not None:
        is_long = batch.is_long[batch.sequences][:, None]
        frequencies = np.where(is_long, operation.long_frequencies, frequencies)
    angles = batch.positions[:, None].astype(np.float32) * frequencies
    magnitude = np.float32(operation.magnitude)
    cos, sin = np.cos(angles)[:, None] * magnitude, np.sin(angles)[:, None] * magnitude
    _rotate(heads, cos, sin, operation.interleaved)


def _rotate(x: Floats, cos: Floats, sin: Floats, interleaved: bool) -> None:
    """Rotates the pairs of x [T, heads, head_dim] in place; cos, sin [T, 1, rotary_dim / 2]."""
    half = cos.shape[-1]
    if interleaved:
        first, second = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    else:
        first, second = x[..., :half], x[..., half : 2 * half]
    rotated = first * cos - second * sin
    second[...] = second * cos + first * sin
    first[...] = rotated


# ---- Attention


@dataclass(frozen=True)
class Span:
    """Consecutive rows of one sequence, and the blocks with all positions that they attend to.

    first  the position at the start of the first block
    end    one past the last position attended to
    """

    rows: slice
    blocks: Array
    first: int
    end: int


def spans(batch: Batch, window: int | None, block_size: int) -> Iterator[Span]:
    starts = np.flatnonzero(np.diff(batch.sequences, prepend=-1)).tolist()
    for start, end in zip(starts, [*starts[1:], len(batch.sequences)]):
        for first in range(start, end, SPAN_ROWS):
            stop = min(first + SPAN_ROWS, end)
            seen = int(batch.positions[stop - 1]) + 1
            unseen = max(0, int(batch.positions[first]) + 1 - window) if window else 0
            block = unseen // block_size
            blocks = batch.block_tables[batch.sequences[start], block : -(-seen // block_size)]
            yield Span(slice(first, stop), blocks, block * block_size, seen)


def attend(
    q: Floats, k: Floats, v: Floats, positions: Array, first: int, operation: Attention
) -> Floats:
    """Causal attention of rows of one sequence over its positions first .. first + C - 1.

    q  [T, num_heads, head_dim];  k, v  [C, num_kv_heads, head_dim];  positions  [T], all >= first
    Returns [T, num_heads, head_dim].  Head h uses kv head h // (num_heads / num_kv_heads).
    """
    num_rows, num_heads, head_dim = q.shape
    length, num_kv_heads, _ = k.shape
    q = q.reshape(num_rows, num_kv_heads, -1, head_dim).transpose(1, 2, 0, 3)
    q = q.reshape(num_kv_heads, -1, head_dim)  # [kv heads, group * T, dim]
    scores: Floats = q @ k.transpose(1, 2, 0)  # [kv heads, group * T, C]
    scores *= np.float32(operation.scale)
    if operation.softcap:
        scores = softcapped(scores, operation.softcap)
    distances = positions[:, None] - np.arange(first, first + length)  # [T, C]
    hidden = distances < 0
    if operation.window:
        hidden |= distances >= operation.window
    np.copyto(scores.reshape(num_kv_heads, -1, num_rows, length), -np.inf, where=hidden)
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    out: Floats = scores @ v.transpose(1, 0, 2)
    out = out.reshape(num_kv_heads, -1, num_rows, head_dim).transpose(2, 0, 1, 3)
    return out.reshape(num_rows, num_heads, head_dim)


# ---- Experts and pooling


def route(logits: Floats, num_chosen: int, normalise: bool) -> tuple[Array, Floats]:
    """The experts chosen for each row, best first, and their weights; both [T, num_chosen]."""
    chosen = np.argsort(-logits, axis=1, kind="stable")[:, :num_chosen]
    logits_chosen = np.take_along_axis(logits, chosen, axis=1)
    weights = np.exp(logits_chosen - logits_chosen[:, :1])
    others = logits_chosen if normalise else logits
    weights /= np.exp(others - logits_chosen[:, :1]).sum(axis=1, keepdims=True)
    return chosen, weights


def pooled(x: Floats, batch: Batch, kind: str) -> Floats:
    """One row for each logit row: the last, or the mean, of its sequence's rows up to itself."""
    if kind == "last":
        return x[batch.logit_rows]
    starts = np.searchsorted(batch.sequences, batch.sequences[batch.logit_rows])
    means = [x[start : row + 1].mean(axis=0) for start, row in zip(starts, batch.logit_rows)]
    return np.stack(means) if means else x[:0]
