"""Operations on rows, against the same in float64."""

import math

import numpy as np
import pytest

from llmsrv.backend.program import Embed
from llmsrv.backend.program import Experts
from llmsrv.backend.program import GatedActivation
from llmsrv.backend.program import Linear
from llmsrv.backend.program import Norm
from llmsrv.backend.program import Pool
from llmsrv.backend.program import SelectLogitRows
from llmsrv.backend.program import Softcap
from llmsrv.backend.sampling.table import SamplingParameters
from tests.support.plans import Piece
from tests.support.reference import compiled
from tests.support.reference import forward
from tests.support.reference import random
from tests.support.reference import run
from tests.support.reference import tensor


def test_embed_takes_rows_of_the_table_and_scales_them():
    table = random(12, 8)
    plan = compiled(Embed("out", tensor("table", table), scale=3.0))
    out = forward(plan, Piece([11, 0, 4, 4], 0, [1]))
    np.testing.assert_array_equal(out, table[[11, 0, 4, 4]] * np.float32(3))


def test_embed_reads_the_ids_that_the_previous_step_sampled():
    rows = np.array([[0.0] * 11 + [1], [1] + [0] * 11, [np.nan] * 12], np.float32)
    table = random(12, 8)
    plan = compiled(Embed("out", tensor("table", table)))
    plan.buffers["logits"] = rows
    for slot in range(3):
        plan.sampling.set(slot, SamplingParameters(temperature=0))
    samples = plan.sample(np.arange(3, dtype=np.int32), np.zeros(3, np.int64))
    assert samples.ids.tolist() == [11, 0, -1]
    out = forward(plan, Piece([-2, -1, -3, 7], 0, [1]))
    np.testing.assert_array_equal(out, table[[0, 11, 0, 7]])  # a failed row counts as id 0


def test_norm_of_a_row_with_an_outlier_and_of_zeros():
    x, weight = random(4, 3000), random(3000, seed=1)
    x[1, 7], x[2] = 1e4, 0
    out = run(Norm("out", "x", tensor("w", weight), 1e-5), x=x)
    exact = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(out, exact, rtol=2e-6, atol=1e-7)


def test_norm_adds_to_its_output_if_it_accumulates():
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


def test_linear_scales_product_and_bias_but_not_what_it_adds_to():
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


def test_gated_activation_can_be_gelu_by_tanh():
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
def test_experts_adds_the_weighted_sum_of_the_best_experts(normalise, function):
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


def test_ties_choose_the_lowest_experts():
    x = np.ones((1, 4), np.float32)
    parts = [tensor(f"w{e}", np.full((4, 4), e + 1.0)) for e in range(3)]
    ones = tensor("ones", np.ones((4, 4)))
    pairs = ((ones, ones), (ones, ones), (ones, ones))
    operation = Experts("out", "x", tensor("r", np.zeros((3, 4))), pairs, tuple(parts), 2, True)
    out = run(operation, x=x, out=np.zeros((1, 4), np.float32))
    activated = silu64(4.0) * 4
    np.testing.assert_allclose(out, np.full((1, 4), 4 * activated * (1 + 2) / 2), rtol=1e-6)


def test_a_nan_in_one_row_does_not_reach_the_experts_of_others():
    x = random(3, 8)
    x[1, 3] = np.nan
    weights = [tensor(f"w{i}", random(8, 8, seed=i)) for i in range(6)]
    pairs = ((weights[0], weights[1]), (weights[2], weights[3]))
    operation = Experts("out", "x", tensor("r", random(2, 8)), pairs, tuple(weights[4:]), 1, True)
    out = run(operation, x=x, out=np.zeros((3, 8), np.float32))
    assert np.isnan(out).all(axis=1).tolist() == [False, True, False]
    assert np.isfinite(out[[0, 2]]).all()


def test_softcap_limits_logits_in_place():
    x = np.float32([[-1e6, -30, -1, 0, 1, 30, 1e6]])
    out = run(Softcap("out", 30.0), out=x)
    np.testing.assert_allclose(out, 30 * np.tanh(x.astype(np.float64) / 30), rtol=1e-6)


@pytest.mark.parametrize("kind", ["last", "mean"])
def test_pool_takes_rows_of_the_same_sequence_only(kind):
    plan = compiled(Pool("out", "x", kind))
    plan.buffers["x"] = x = random(6, 4)
    pieces = [Piece([1, 2], 0, [1]), Piece([3], 5, [2], wants_logits=False), Piece([4] * 3, 0, [3])]
    out = forward(plan, *pieces)
    expected = [x[1], x[5]] if kind == "last" else [x[:2].mean(0), x[3:].mean(0)]
    np.testing.assert_allclose(out, expected, rtol=1e-6)


def test_select_logit_rows_keeps_the_logit_rows_only():
    plan = compiled(SelectLogitRows("out", "x"))
    plan.buffers["x"] = random(6, 4)
    pieces = [Piece([1, 2], 0, [1]), Piece([3], 5, [2], wants_logits=False), Piece([4] * 3, 0, [3])]
    np.testing.assert_array_equal(forward(plan, *pieces), plan.buffers["x"][[1, 5]])
