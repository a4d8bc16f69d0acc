"""Rope and attention, against the same in float64."""

import numpy as np
import pytest

from llmsrv.backend.base import BLOCK_SIZE
from llmsrv.backend.program import Attention
from llmsrv.backend.program import RopeAndStore
from tests.support.plans import Piece
from tests.support.reference import HEAD_DIM
from tests.support.reference import NUM_BLOCKS
from tests.support.reference import NUM_HEADS
from tests.support.reference import NUM_KV_HEADS
from tests.support.reference import QKV_HEADS
from tests.support.reference import compiled
from tests.support.reference import forward
from tests.support.reference import random
from tests.support.reference import tensor


def rotated(head, position, frequencies, interleaved, magnitude):
    """One head rotated in the complex plane, pair by pair, in float64."""
    half = len(frequencies)
    out = head.astype(np.float64)
    for i, frequency in enumerate(frequencies.astype(np.float64)):
        first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        pair = complex(head[first], head[second]) * np.exp(1j * position * frequency) * magnitude
        out[first], out[second] = pair.real, pair.imag
    return out


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [4, HEAD_DIM])
@pytest.mark.parametrize("magnitude", [1.0, 1.25])
def test_rope_rotates_q_and_k_and_stores_k_and_v(interleaved, rotary_dim, magnitude):
    frequencies = np.float32(100.0) ** -(np.arange(0, rotary_dim, 2, dtype=np.float32) / rotary_dim)
    rope = RopeAndStore("out", 0, frequencies, magnitude=magnitude, interleaved=interleaved)
    plan = compiled(rope)
    qkv = random(21, QKV_HEADS * HEAD_DIM)
    plan.buffers["out"] = qkv.copy()
    # 18 rows from position 14: the end of one block and the whole of the next.
    pieces = [Piece([0] * 18, 14, [9, 4, 7]), Piece([0] * 3, 0, [2])]
    out = forward(plan, *pieces).reshape(21, QKV_HEADS, HEAD_DIM)
    heads, positions = qkv.reshape(out.shape), [*range(14, 32), 0, 1, 2]
    for row, position in enumerate(positions):
        for head in range(NUM_HEADS + NUM_KV_HEADS):
            exact = rotated(heads[row, head], position, frequencies, interleaved, magnitude)
            np.testing.assert_allclose(out[row, head], exact, atol=1e-5)
    np.testing.assert_array_equal(out[:, -NUM_KV_HEADS:], heads[:, -NUM_KV_HEADS:])
    blocks = [9] * 2 + [4] * 16 + [2] * 3
    for row, (block, position) in enumerate(zip(blocks, positions)):
        k, v = plan.k_cache[block, 0], plan.v_cache[block, 0]
        np.testing.assert_array_equal(k[position % BLOCK_SIZE], out[row, NUM_HEADS:-NUM_KV_HEADS])
        np.testing.assert_array_equal(v[position % BLOCK_SIZE], out[row, -NUM_KV_HEADS:])


FREQUENCIES = np.float32([1.0, 0.5, 0.25, 0.125])


def test_long_sequences_rotate_by_their_own_frequencies():
    plan = compiled(RopeAndStore("out", 0, FREQUENCIES, long_frequencies=FREQUENCIES / 3))
    plan.buffers["out"] = qkv = random(5, QKV_HEADS * HEAD_DIM)
    heads = qkv.copy().reshape(5, QKV_HEADS, HEAD_DIM)
    pieces = [Piece([0] * 2, 3, [1]), Piece([0] * 3, 7, [2], is_long=True)]
    out = forward(plan, *pieces).reshape(heads.shape)
    for row, position in enumerate([3, 4, 7, 8, 9]):
        frequencies = FREQUENCIES if row < 2 else FREQUENCIES / 3
        for head in range(NUM_HEADS + NUM_KV_HEADS):
            exact = rotated(heads[row, head], position, frequencies, False, 1.0)
            np.testing.assert_allclose(out[row, head], exact, atol=1e-5)


def test_a_layer_without_frequencies_stores_k_and_v_unchanged():
    plan = compiled(RopeAndStore("out", 0, None))
    plan.buffers["out"] = qkv = random(2, QKV_HEADS * HEAD_DIM)
    out = forward(plan, Piece([0, 0], 9, [3])).copy()
    np.testing.assert_array_equal(out, qkv)
    k = qkv.reshape(2, QKV_HEADS, HEAD_DIM)[:, NUM_HEADS:-NUM_KV_HEADS]
    np.testing.assert_array_equal(plan.k_cache[3, 0, 9:11], k)


@pytest.mark.parametrize("together", [False, True])
def test_q_and_k_are_normalized_by_head_or_together_before_the_rotation(together):
    q_size = HEAD_DIM * (NUM_HEADS if together else 1)
    k_size = HEAD_DIM * (NUM_KV_HEADS if together else 1)
    q_weight, k_weight = random(q_size, seed=1), random(k_size, seed=2)
    norms = {"q_norm": tensor("q", q_weight), "k_norm": tensor("k", k_weight), "eps": 1e-3}
    plan = compiled(RopeAndStore("out", 0, FREQUENCIES, **norms))
    plan.buffers["out"] = qkv = random(3, QKV_HEADS * HEAD_DIM)
    heads = qkv.reshape(3, QKV_HEADS, HEAD_DIM).astype(np.float64)
    q, k, v = np.split(heads, [NUM_HEADS, NUM_HEADS + NUM_KV_HEADS], axis=1)
    normed = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        groups = x.reshape(3, -1, len(weight))
        mean_square = (groups**2).mean(-1, keepdims=True)
        normed.append((groups / np.sqrt(mean_square + 1e-3) * weight).reshape(x.shape))
    out = forward(plan, Piece([0] * 3, 4, [1])).reshape(heads.shape)
    for row, position in enumerate([4, 5, 6]):
        for head, x in enumerate(np.concatenate(normed, axis=1)[row]):
            exact = rotated(x, position, FREQUENCIES, False, 1.0)
            np.testing.assert_allclose(out[row, head], exact, atol=1e-5)
    np.testing.assert_array_equal(out[:, -NUM_KV_HEADS:], v.astype(np.float32))


def attention64(q, k, v, positions, operation):
    """Attention row by row and head by head, over k and v [C, kv heads, dim], in float64."""
    out = np.zeros(q.shape)
    for row, position in enumerate(positions):
        first = max(0, position + 1 - operation.window) if operation.window else 0
        for head in range(NUM_HEADS):
            kv = head // (NUM_HEADS // NUM_KV_HEADS)
            scores = k[first : position + 1, kv].astype(np.float64) @ q[row, head] * operation.scale
            if operation.softcap:
                scores = operation.softcap * np.tanh(scores / operation.softcap)
            weights = np.exp(scores - scores.max())
            out[row, head] = weights / weights.sum() @ v[first : position + 1, kv]
    return out


@pytest.mark.parametrize("window", [None, 1, 5, 16, 17, 48, 1000])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_reads_only_the_blocks_of_its_own_sequence(window, softcap):
    """One batch of sequences with lengths around block edges, in decode and in chunks."""
    operation = Attention("out", "qkv", 0, scale=0.3, window=window, softcap=softcap)
    plan = compiled(operation)
    free = iter(np.random.default_rng(1).permutation(NUM_BLOCKS - 1) + 1)
    # Positions that are not stored hold NaN, so that reading them shows.
    plan.k_cache[:], plan.v_cache[:] = np.nan, np.nan
    pieces, stored = [], []
    for length, num_rows in [(1, 1), (15, 1), (16, 16), (17, 2), (33, 7), (48, 1), (49, 5)]:
        k, v = random(2, length, NUM_KV_HEADS, HEAD_DIM, seed=length) * 2
        blocks = [int(next(free)) for _ in range(-(-length // BLOCK_SIZE))]
        for position in range(length):
            block, offset = blocks[position // BLOCK_SIZE], position % BLOCK_SIZE
            plan.k_cache[block, 0, offset] = k[position]
            plan.v_cache[block, 0, offset] = v[position]
        pieces.append(Piece([0] * num_rows, length - num_rows, blocks))
        stored.append((k, v, range(length - num_rows, length)))
    num_rows = sum(len(piece.ids) for piece in pieces)
    plan.buffers["qkv"] = random(num_rows, QKV_HEADS * HEAD_DIM)
    q = plan.buffers["qkv"].reshape(num_rows, QKV_HEADS, HEAD_DIM)[:, :NUM_HEADS]
    out = forward(plan, *pieces).reshape(q.shape)
    start = 0
    for k, v, positions in stored:
        rows = slice(start, start + len(positions))
        expected = attention64(q[rows], k, v, positions, operation)
        np.testing.assert_allclose(out[rows], expected, atol=1e-5)
        start = rows.stop


def test_attention_with_scores_too_large_for_exp_is_finite():
    plan = compiled(Attention("out", "qkv", 0, scale=1.0))
    plan.k_cache[1, 0, 0], plan.k_cache[1, 0, 1] = 1e3, -1e3
    plan.v_cache[1, 0, 0], plan.v_cache[1, 0, 1] = 5, 7
    plan.buffers["qkv"] = np.full((1, QKV_HEADS * HEAD_DIM), 1e3, np.float32)
    np.testing.assert_array_equal(forward(plan, Piece([0], 1, [1])), np.full((1, 48), 5.0))
