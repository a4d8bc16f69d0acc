"""Backends against the reference backend: Linear, for weights of every type."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from llmsrv.backend.program import GatedActivation
from llmsrv.backend.program import Linear
from llmsrv.backend.program import Program
from llmsrv.backend.quants.random_tensors import random_tensor
from tests.support.operations import KERNEL_TYPES
from tests.support.operations import LIMITS
from tests.support.operations import OTHER_TYPES
from tests.support.operations import VOCAB
from tests.support.operations import error_of
from tests.support.operations import one_prompt
from tests.support.operations import random
from tests.support.operations import run_both
from tests.support.operations import tensor
from tests.support.operations import write_buffer
from tests.support.parameters import slow_but
from tests.support.plans import batch_of


@pytest.mark.parametrize("type", KERNEL_TYPES)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 6, 7, 13, 300])
def test_linear_multiplies_weights_of_every_type(backend, type, num_rows):
    columns = 512 if type.endswith("_K") else 96
    x = random(num_rows, columns)
    x[:, 5] *= 20  # an outlier, as in real activations
    weight = random_tensor("w", type, (45, columns))
    linear = Linear("out", "x", (weight,))
    outputs = run_both(backend, [linear], {"x": columns, "out": 45}, one_prompt(num_rows), x=x)
    ours, theirs = outputs["out"]
    error = error_of(backend, 3e-4) * np.abs(theirs).max()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=error)


@pytest.mark.parametrize("type", KERNEL_TYPES)
@pytest.mark.parametrize("columns", slow_but([32, 256, 768, 1568], 32, 1568))
def test_a_row_has_the_same_bits_in_any_number_of_rows(cpu, type, columns):
    if type.endswith("_K") and columns % 256:
        columns = 256 * (columns // 256 + 1)
    weight = random_tensor("w", type, (100, columns))
    operations = (Linear("out", "x", (weight,)),)
    program = Program(operations, {"x": columns, "out": 100}, 1, 4, 2, 16, vocab_size=VOCAB)
    plan = cpu.compile(program, LIMITS, lambda: None)
    x = random(50, columns) * np.exp2(np.arange(50, dtype=np.float32) * 4 - 100)[:, None]
    x[7], x[8, 3], x[9] = 0, 1e30, np.abs(x[9])

    def multiplied(some):
        write_buffer(plan, "x", some)
        plan.forward(batch_of(one_prompt(len(some))))
        return plan.read("out").tobytes()

    alone = b"".join(multiplied(x[i : i + 1]) for i in range(50))
    for count in (2, 3, 4, 5, 17, 33, 50):
        parts = [multiplied(x[i : i + count]) for i in range(0, 50, count)]
        assert b"".join(parts) == alone, count


@pytest.mark.parametrize("type", KERNEL_TYPES)
def test_linear_with_eight_bits_has_the_error_of_eight_bits(cpu8, type):
    columns = 512 if type.endswith("_K") else 96
    x = random(20, columns)
    linear = Linear("out", "x", (random_tensor("w", type, (45, columns)),))
    ours, theirs = run_both(cpu8, [linear], {"x": columns, "out": 45}, one_prompt(20), x=x)["out"]
    assert np.abs(ours - theirs).mean() < 0.02 * np.abs(theirs).mean()


@pytest.mark.parametrize("type", OTHER_TYPES)
def test_types_without_kernels_become_floats(backend, type):
    linear = Linear("out", "x", (random_tensor("w", type, (20, 512)),))
    outputs = run_both(backend, [linear], {"x": 512, "out": 20}, one_prompt(3), x=random(3, 512))
    ours, theirs = outputs["out"]
    error = error_of(backend, 1e-5) * np.abs(theirs).max()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=error)


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.sampled_from(KERNEL_TYPES), st.integers(1, 70)), min_size=1, max_size=4),
    st.integers(1, 40),
    st.booleans(),
    st.booleans(),
)
def test_linear_stacks_weights_of_several_types(backend, stack, num_rows, has_biases, accumulate):
    weights = tuple(
        random_tensor(f"w{i}", type, (size, 256), seed=i) for i, (type, size) in enumerate(stack)
    )
    biases = tuple(tensor(f"b{i}", random(size, seed=i)) for i, (_, size) in enumerate(stack))
    linear = Linear("out", "x", weights, biases if has_biases else (), 0.5, accumulate)
    width = sum(size for _, size in stack)
    before = random(num_rows, width, seed=9)
    values = {"x": random(num_rows, 256), "out": before}
    outputs = run_both(backend, [linear], {"x": 256, "out": width}, one_prompt(num_rows), **values)
    ours, theirs = outputs["out"]
    error = error_of(backend, 1e-3) * np.abs(theirs).max()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=error)


@pytest.mark.parametrize("type", ["Q4_1", "Q8_0", "F16"])
@pytest.mark.parametrize("function", ["silu", "gelu"])
@pytest.mark.parametrize("num_rows", [1, 5, 40])
def test_a_fused_gated_activation_equals_separate_operations(backend, type, function, num_rows):
    weights = tuple(random_tensor(name, type, (80, 96), seed=i) for i, name in enumerate("gu"))
    biases = tuple(tensor(f"b{name}", random(80, seed=i)) for i, name in enumerate("gu"))
    operations = [
        Linear("both", "x", weights, biases, 0.01),
        GatedActivation("out", "both", function),
    ]
    widths = {"x": 96, "both": 160, "out": 80}
    outputs = run_both(backend, operations, widths, one_prompt(num_rows), x=random(num_rows, 96))
    ours, theirs = outputs["out"]
    error = error_of(backend, 5e-4) * np.abs(theirs).max()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=error)
