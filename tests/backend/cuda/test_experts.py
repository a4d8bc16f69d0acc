"""Experts on CUDA: how choices are grouped, and rows that have no finite logits.

tests/backend/cpu/test_operations.py runs on CUDA too.
"""

import dataclasses

import numpy as np
import pytest

from llmsrv.backend.cuda.experts import ExpertKernels
from llmsrv.backend.program import Experts
from llmsrv.backend.program import Program
from llmsrv.backend.quants.random_tensors import random_tensor
from llmsrv.backend.reference.operations import gated
from llmsrv.backend.reference.operations import route
from tests.backend.cuda.test_linear import ROUNDED
from tests.backend.cuda.test_linear import Products
from tests.backend.cuda.test_linear import assert_near
from tests.backend.cuda.test_linear import dequantized
from tests.support.cuda import MODES
from tests.support.cuda import mode
from tests.support.cuda import needs_emulation
from tests.support.operations import LIMITS
from tests.support.operations import VOCAB
from tests.support.operations import random
from tests.support.parameters import slow_but

pytestmark = needs_emulation


def experts_of(type, num_experts, hidden, intermediate, num_chosen, normalise=True):
    def weights(name, rows, columns):
        return tuple(
            random_tensor(f"{name}{e}", type, (rows, columns), e, 0.2) for e in range(num_experts)
        )

    gates, ups = weights("gate", intermediate, hidden), weights("up", intermediate, hidden)
    router = random_tensor("router", "F16", (num_experts, hidden), 9)
    down = weights("down", hidden, intermediate)
    pairs = tuple(zip(gates, ups))
    return Experts("out", "x", router, pairs, down, num_chosen, normalise, scale=0.5)


def run(products, operation, x, before):
    """out after the operation, if it was `before`."""
    cupy = products.cupy
    program = Program(
        (operation,), {"x": x.shape[1], "out": x.shape[1]}, 1, 4, 2, 16, vocab_size=VOCAB
    )
    kernels = ExpertKernels(
        cupy, products.kernels, products.linear, program, LIMITS, products.dtype
    )
    out = cupy.asarray(before)
    packed = kernels.pack(operation, lambda: None)
    num_bytes = sum(each.num_bytes for each in (packed.router, packed.gate_up, packed.down))
    assert num_bytes == kernels.packed_bytes(operation)
    kernels.experts(out, products.operand(x), packed, len(x))
    return out.get()


def reference(operation, x):
    """What is added to `out`, for x as an operand holds it."""
    logits = x @ dequantized(operation.router).T
    chosen, weights = route(logits, operation.num_chosen, operation.normalise)
    added = np.zeros_like(x)
    for e, ((gate, up), down) in enumerate(zip(operation.gate_up, operation.down)):
        rows, places = np.nonzero(chosen == e)
        both = np.concatenate([dequantized(gate), dequantized(up)])
        returned = gated(x[rows] @ both.T, "silu") @ dequantized(down).T
        added[rows] += weights[rows, places, None] * returned
    return np.float32(operation.scale) * added


def assert_right(products, operation, num_rows):
    hidden = operation.router.shape[1]
    x, before = products.rounded(random(num_rows, hidden)), random(num_rows, hidden, seed=1)
    theirs = before + reference(operation, x)
    assert_near(run(products, operation, x, before), theirs, 2 * ROUNDED)


@pytest.mark.parametrize("how", slow_but(MODES, "in order"))
@pytest.mark.parametrize("num_rows", slow_but([1, 30, 300], 30))
@pytest.mark.parametrize("type", slow_but(["F16", "Q4_0"], "F16"))
def test_choices_are_grouped_by_expert(cupy, how, num_rows, type):
    """By 8 rows or fewer, by 16, and by 64."""
    with mode(**MODES[how]):
        assert_right(Products(cupy), experts_of(type, 11, 96, 160, 3), num_rows)


@pytest.mark.slow
@pytest.mark.parametrize("type", ["Q8_0", "Q5_1", "Q5_K"])
@pytest.mark.parametrize("num_rows", [5, 60])
def test_more_experts_than_lanes(cupy, type, num_rows):
    size = 256 if type.endswith("_K") else 64
    assert_right(Products(cupy), experts_of(type, 70, size, size, 6, normalise=False), num_rows)


@pytest.mark.slow
def test_weights_of_mixed_types_become_16_bits(cupy):
    """As in files that keep a few layers more precise than others."""
    operation = experts_of("Q8_0", 5, 64, 64, 2)
    gates = experts_of("Q4_1", 5, 64, 64, 2).down
    pairs = tuple((gate, up) for gate, (_, up) in zip(gates, operation.gate_up))
    assert_right(Products(cupy), dataclasses.replace(operation, gate_up=pairs), 20)


@pytest.mark.slow
def test_a_row_has_the_same_bits_in_any_number_of_rows(cupy):
    products = Products(cupy, is_batch_invariant=True)
    operation = experts_of("Q4_1", 5, 64, 64, 2)
    x, before = random(300, 64), random(300, 64, seed=1)
    together = run(products, operation, x, before)
    for count in (1, 20, 150):
        ours = run(products, operation, x[7 : 7 + count], before[7 : 7 + count])
        np.testing.assert_array_equal(ours, together[7 : 7 + count])


def test_ties_and_rows_that_are_nan_or_infinite(cupy):
    """Equal logits choose the experts with the lowest numbers.  Logits that are NaN choose any; the
    other rows are as without."""
    products = Products(cupy)
    operation = experts_of("F16", 11, 96, 160, 3)
    x, before = products.rounded(random(8, 96)), np.zeros((8, 96), np.float32)
    x[2] = 0
    theirs = reference(operation, x)
    x[1], x[6] = np.nan, 60000
    ours = run(products, operation, x, before)
    assert np.isnan(ours[1]).all()
    others = [0, 2, 3, 4, 5, 7]
    assert_near(ours[others], theirs[others], 2 * ROUNDED)
