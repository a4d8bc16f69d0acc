"""Each operation of the reference backend against the same thing written out in float64."""

import math

import numpy as np
import pytest

from llmsrv.backend.base import BLOCK_SIZE
from llmsrv.backend.base import Limits
from llmsrv.backend.program import Attention
from llmsrv.backend.program import Embed
from llmsrv.backend.program import Experts
from llmsrv.backend.program import GatedActivation
from llmsrv.backend.program import Linear
from llmsrv.backend.program import Norm
from llmsrv.backend.program import Pool
from llmsrv.backend.program import Program
from llmsrv.backend.program import RopeAndStore
from llmsrv.backend.program import SelectLogitRows
from llmsrv.backend.program import Softcap
from llmsrv.backend.program import Tensor
from llmsrv.backend.reference.backend import ReferenceBackend
from llmsrv.backend.sampling.table import SamplingParameters
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


def test_norm_adds_to_what_is_there_when_it_accumulates():
    x, weight, before = random(4, 32), random(32, seed=1), random(4, 32, seed=2)
    out = run(Norm("out", "x", tensor("w", weight), 1e-5, accumulate=True), x=x, out=before)
    mean_square = (x.astype(np.float64) ** 2).mean(-1, keepdims=True)
    exact = before + x / np.sqrt(mean_square + 1e-5) * weight
    np.testing.assert_allclose(out, exact, atol=1e-6)


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


def test_linear_scales_weights_and_biases_but_not_what_it_adds_to():
    x, before, w, b = random(3, 32), random(3, 5, seed=1), random(5, 32, seed=2), random(5)
    operation = Linear("out", "x", (tensor("w", w),), (tensor("b", b),), 0.3, accumulate=True)
    expected = before + (x.astype(np.float64) @ w.T + b) * 0.3
    np.testing.assert_allclose(run(operation, x=x, out=before), expected, atol=1e-5)


def test_gated_activation_is_silu_of_the_gate_times_up():
    gate = np.float32([[-1e4, -100, -1, 0, 1, 100, 1e4]])
    up = random(1, 7)
    out = run(GatedActivation("out", "x"), x=np.concatenate([gate, up], axis=1))
    with np.errstate(over="ignore"):
        exact = gate / (1 + np.exp(-gate.astype(np.float64))) * up
    np.testing.assert_allclose(out, exact, rtol=1e-6, atol=1e-38)


def test_gated_activation_may_be_gelu_by_tanh():
    gate = np.float32([[-1e4, -100, -3, -1, 0, 1, 3, 100, 1e4]])
    up = random(1, 9)
    out = run(GatedActivation("out", "x", "gelu"), x=np.concatenate([gate, up], axis=1))
    exact = [gelu64(value) for value in gate[0]] * up
    np.testing.assert_allclose(out, exact, rtol=1e-5, atol=1e-6)


def gelu64(x):
    return 0.5 * float(x) * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * float(x) ** 3)))


def silu64(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("function", ["silu", "gelu"])
def test_experts_adds_the_weighted_sum_of_the_best(normalise, function):
    num_experts, num_chosen, hidden, inner = 5, 2, 16, 24
    x, before, router = random(9, hidden), random(9, hidden, seed=1), random(5, hidden, seed=2)
    gates, ups, downs = (
        random(num_experts, *shape, seed=3 + i)
        for i, shape in enumerate([(inner, hidden), (inner, hidden), (hidden, inner)])
    )
    operation = Experts(
        "out",
        "x",
        tensor("router", router),
        tuple((tensor(f"g{e}", gates[e]), tensor(f"u{e}", ups[e])) for e in range(num_experts)),
        tuple(tensor(f"d{e}", downs[e]) for e in range(num_experts)),
        num_chosen,
        normalise,
        function,
        scale=0.7,
    )
    expected = before.astype(np.float64)
    for row, logits in enumerate(x.astype(np.float64) @ router.T):
        chosen = sorted(range(num_experts), key=lambda expert: -logits[expert])[:num_chosen]
        total = np.exp(logits[chosen] if normalise else logits).sum()
        for expert in chosen:
            gate, up = gates[expert] @ x[row], ups[expert] @ x[row]
            activated = np.vectorize(gelu64)(gate) if function == "gelu" else silu64(gate)
            weight = np.exp(logits[expert]) / total
            expected[row] += 0.7 * weight * (downs[expert] @ (activated * up))
    np.testing.assert_allclose(run(operation, x=x, out=before), expected, atol=2e-5, rtol=1e-5)


def test_of_equal_experts_the_lowest_are_chosen():
    x = np.ones((1, 4), np.float32)
    parts = [tensor(f"w{e}", np.full((4, 4), e + 1.0)) for e in range(3)]
    ones = tensor("ones", np.ones((4, 4)))
    pairs = ((ones, ones), (ones, ones), (ones, ones))
    operation = Experts("out", "x", tensor("r", np.zeros((3, 4))), pairs, tuple(parts), 2, True)
    out = run(operation, x=x, out=np.zeros((1, 4), np.float32))
    activated = silu64(4.0) * 4
    np.testing.assert_allclose(out, np.full((1, 4), 4 * activated * (1 + 2) / 2), rtol=1e-6)


def test_a_nan_in_one_row_stays_out_of_the_others_experts():
    x = random(3, 8)
    x[1, 3] = np.nan
    weights = [tensor(f"w{i}", random(8, 8, seed=i)) for i in range(6)]
    pairs = ((weights[0], weights[1]), (weights[2], weights[3]))
    operation = Experts("out", "x", tensor("r", random(2, 8)), pairs, tuple(weights[4:]), 1, True)
    out = run(operation, x=x, out=np.zeros((3, 8), np.float32))
    assert np.isnan(out).all(axis=1).tolist() == [False, True, False]
    assert np.isfinite(out[[0, 2]]).all()


def test_softcap_bends_logits_in_place():
    x = np.float32([[-1e6, -30, -1, 0, 1, 30, 1e6]])
    out = run(Softcap("out", 30.0), out=x)
    np.testing.assert_allclose(out, 30 * np.tanh(x.astype(np.float64) / 30), rtol=1e-6)


@pytest.mark.parametrize("kind", ["last", "mean"])
def test_pool_is_of_the_rows_of_the_same_sequence(kind):
    plan = compiled(Pool("out", "x", kind))
    plan.buffers["x"] = x = random(6, 4)
    pieces = [Piece([1, 2], 0, [1]), Piece([3], 5, [2], wants_logits=False), Piece([4] * 3, 0, [3])]
    out = forward(plan, *pieces)
    expected = [x[1], x[5]] if kind == "last" else [x[:2].mean(0), x[3:].mean(0)]
    np.testing.assert_allclose(out, expected, rtol=1e-6)


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


FREQUENCIES = np.float32([1.0, 0.5, 0.25, 0.125])


def test_long_sequences_turn_by_their_own_frequencies():
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


def test_a_layer_without_frequencies_stores_what_it_is_given():
    plan = compiled(RopeAndStore("out", 0, None))
    plan.buffers["out"] = qkv = random(2, QKV_HEADS * HEAD_DIM)
    out = forward(plan, Piece([0, 0], 9, [3])).copy()
    np.testing.assert_array_equal(out, qkv)
    k = qkv.reshape(2, QKV_HEADS, HEAD_DIM)[:, NUM_HEADS:-NUM_KV_HEADS]
    np.testing.assert_array_equal(plan.k_cache[3, 0, 9:11], k)


@pytest.mark.parametrize("together", [False, True])
def test_q_and_k_are_normed_by_head_or_together_before_they_turn(together):
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
    """Row by row and head by head, over k and v [C, kv heads, dim]."""
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
def test_attention_reads_its_own_sequences_blocks_and_nothing_else(window, softcap):
    """Sequences of every length about the edges of blocks, decoding and in chunks, in one batch."""
    operation = Attention("out", "qkv", 0, scale=0.3, window=window, softcap=softcap)
    plan = compiled(operation)
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
        expected = attention64(q[rows], k, v, positions, operation)
        np.testing.assert_allclose(out[rows], expected, atol=1e-5)
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
