"""Each operation of the reference backend against the same thing written out in float64."""

import numpy as np
import pytest

from llmsrv.backend.base import BLOCK_SIZE
from llmsrv.backend.base import Attention
from llmsrv.backend.base import Embed
from llmsrv.backend.base import GatedActivation
from llmsrv.backend.base import Limits
from llmsrv.backend.base import Linear
from llmsrv.backend.base import Norm
from llmsrv.backend.base import Program
from llmsrv.backend.base import RopeAndStore
from llmsrv.backend.base import SelectLogitRows
from llmsrv.backend.base import Tensor
from llmsrv.backend.reference import ReferenceBackend
from llmsrv.backend.sampling import SamplingParameters
from llmsrv.errors import StartupError
from tests.support.plans import Piece
from tests.support.plans import batch_of

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 6, 2, 8
QKV_HEADS = NUM_HEADS + 2 * NUM_KV_HEADS
NUM_BLOCKS = 24


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def tensor(name, values):
    values = np.asarray(values, np.float32)
    return Tensor(name, "F32", values.shape, values.reshape(-1).view(np.uint8))


def compiled(*operations, tick=lambda: None):
    """A plan whose vocabulary has 12 ids."""
    program = Program(operations, {}, 1, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, vocab_size=12)
    limits = Limits(max_rows=64, max_logit_rows=8, max_slots=8, num_blocks=NUM_BLOCKS)
    return ReferenceBackend().compile(program, limits, tick)


def forward(plan, *pieces):
    plan.forward(batch_of(pieces or [Piece([0], 0, [1])]))
    return plan.buffers["out"]


def run(*operations, **buffers):
    """What the operations leave in `out` when the buffers hold these values."""
    plan = compiled(*operations)
    plan.buffers.update(buffers)
    return forward(plan)


# ---- Operations on rows


def test_embed_takes_rows_of_the_table_and_scales_them():
    table = random(12, 8)
    plan = compiled(Embed("out", tensor("table", table), scale=3.0))
    out = forward(plan, Piece([11, 0, 4, 4], 0, [1]))
    np.testing.assert_array_equal(out, table[[11, 0, 4, 4]] * np.float32(3))


def test_embed_reads_what_logit_rows_sampled_the_step_before():
    rows = np.array([[0.0] * 11 + [1], [1] + [0] * 11, [np.nan] * 12], np.float32)
    table = random(12, 8)
    plan = compiled(Embed("out", tensor("table", table)))
    plan.buffers["logits"] = rows
    for slot in range(3):
        plan.sampling.set(slot, SamplingParameters(temperature=0))
    samples = plan.sample(np.arange(3, dtype=np.int32), np.zeros(3, np.int64))
    assert samples.ids.tolist() == [11, 0, -1]
    out = forward(plan, Piece([-2, -1, -3, 7], 0, [1]))
    np.testing.assert_array_equal(out, table[[0, 11, 0, 7]])  # a failed row reads as id 0


def test_norm_of_rows_with_outliers_and_of_zeros():
    x, weight = random(4, 3000), random(3000, seed=1)
    x[1, 7], x[2] = 1e4, 0
    out = run(Norm("out", "x", tensor("w", weight), 1e-5), x=x)
    exact = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(out, exact, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("num_rows", [1, 2, 32, 33])
@pytest.mark.parametrize("has_biases", [False, True])
@pytest.mark.parametrize("accumulate", [False, True])
def test_linear_stacks_weights_adds_biases_and_accumulates(num_rows, has_biases, accumulate):
    x, before = random(num_rows, 32, seed=1), random(num_rows, 15, seed=2)
    weights, biases = [random(5, 32), random(10, 32, seed=3)], [random(5), random(10)]
    expected = x.astype(np.float64) @ np.concatenate(weights).T + before * accumulate
    expected += np.concatenate(biases) * has_biases
    operation = Linear(
        "out",
        "x",
        tuple(tensor(f"w{i}", w) for i, w in enumerate(weights)),
        tuple(tensor(f"b{i}", b) for i, b in enumerate(biases)) if has_biases else (),
        accumulate=accumulate,
    )
    np.testing.assert_allclose(run(operation, x=x, out=before), expected, atol=2e-5)


def test_gated_activation_is_silu_of_the_gate_times_up():
    gate = np.float32([[-1e4, -100, -1, 0, 1, 100, 1e4]])
    up = random(1, 7)
    out = run(GatedActivation("out", "x"), x=np.concatenate([gate, up], axis=1))
    with np.errstate(over="ignore"):
        exact = gate / (1 + np.exp(-gate.astype(np.float64))) * up
    np.testing.assert_allclose(out, exact, rtol=1e-6, atol=1e-38)


def test_select_logit_rows_leaves_only_what_is_wanted():
    plan = compiled(SelectLogitRows("out", "x"))
    plan.buffers["x"] = random(6, 4)
    pieces = [Piece([1, 2], 0, [1]), Piece([3], 5, [2], wants_logits=False), Piece([4] * 3, 0, [3])]
    np.testing.assert_array_equal(forward(plan, *pieces), plan.buffers["x"][[1, 5]])


# ---- Rope and attention


def rotated(head, position, frequencies, interleaved, magnitude):
    """One head turned in the complex plane, pair by pair, in float64."""
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
def test_rope_turns_q_and_k_and_stores_k_and_v(interleaved, rotary_dim, magnitude):
    frequencies = np.float32(100.0) ** -(np.arange(0, rotary_dim, 2, dtype=np.float32) / rotary_dim)
    rope = RopeAndStore("out", 0, frequencies, magnitude=magnitude, interleaved=interleaved)
    plan = compiled(rope)
    qkv = random(21, QKV_HEADS * HEAD_DIM)
    plan.buffers["out"] = qkv.copy()
    # 18 rows from position 14 on: the end of one block, a whole one and the start of another.
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


def attention64(q, k, v, positions, scale):
    """Row by row and head by head, over k and v [C, kv heads, dim]."""
    out = np.zeros(q.shape)
    for row, position in enumerate(positions):
        for head in range(NUM_HEADS):
            kv = head // (NUM_HEADS // NUM_KV_HEADS)
            scores = k[: position + 1, kv].astype(np.float64) @ q[row, head] * scale
            weights = np.exp(scores - scores.max())
            out[row, head] = weights / weights.sum() @ v[: position + 1, kv]
    return out


def test_attention_reads_its_own_sequences_blocks_and_nothing_else():
    """Sequences of every length about the edges of blocks, decoding and in chunks, in one batch."""
    plan = compiled(Attention("out", "qkv", 0, scale=0.3))
    free = iter(np.random.default_rng(1).permutation(NUM_BLOCKS - 1) + 1)
    # What is not stored is NaN: reading it shows.
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
        np.testing.assert_allclose(out[rows], attention64(q[rows], k, v, positions, 0.3), atol=1e-5)
        start = rows.stop


def test_attention_survives_scores_far_beyond_exp():
    plan = compiled(Attention("out", "qkv", 0, scale=1.0))
    plan.k_cache[1, 0, 0], plan.k_cache[1, 0, 1] = 1e3, -1e3
    plan.v_cache[1, 0, 0], plan.v_cache[1, 0, 1] = 5, 7
    plan.buffers["qkv"] = np.full((1, QKV_HEADS * HEAD_DIM), 1e3, np.float32)
    np.testing.assert_array_equal(forward(plan, Piece([0], 1, [1])), np.full((1, 48), 5.0))


# ---- Laying out


def test_every_weight_and_every_operation_ticks():
    ticks = []
    weights = tensor("a", random(4, 8)), tensor("b", random(4, 8))
    plan = compiled(
        Embed("x", tensor("table", random(12, 8))),
        Linear("out", "x", weights),
        Linear("out", "x", weights),  # the same weights are laid out once
        tick=lambda: ticks.append(1),
    )
    assert len(ticks) == 2 and len(plan.weights) == 1
    forward(plan)
    assert len(ticks) == 5


@pytest.mark.parametrize("operation", [Embed, lambda out, w: Linear(out, "x", (w,))])
def test_a_type_that_it_does_not_know_is_refused_by_name(operation):
    weight = Tensor("blk.0.attn_q.weight", "Q8_K", (2, 256), np.zeros(584, np.uint8))
    with pytest.raises(StartupError, match="blk.0.attn_q.weight.* Q8_K.*Q4_0, Q4_1, Q5_0"):
        compiled(operation("out", weight))


def test_weights_larger_than_the_machine_are_refused_before_they_are_made():
    weight = Tensor("huge", "F32", (1 << 30, 1 << 14), np.zeros(0, np.uint8))
    with pytest.raises(StartupError, match="needs 67108864 MiB .* choose a smaller model"):
        compiled(Linear("out", "x", (weight,)))


def test_a_cache_larger_than_the_address_space_is_refused():
    program = Program((), {}, 1, 1, 1, 128, 12)
    with pytest.raises(StartupError, match="KV cache of 70368744177664 positions"):
        ReferenceBackend().compile(program, Limits(1, 1, 1, 1 << 42), lambda: None)
