"""The kernels of products, norms and embeddings against numpy, over more than two tiles each way.

tests/backend/cpu/test_linear.py and test_operations.py run on CUDA too, with smaller shapes.
"""

import numpy as np
import pytest

from llmsrv.backend.cuda.buffers import stride_of
from llmsrv.backend.cuda.device import Device
from llmsrv.backend.cuda.linear import LinearKernels
from llmsrv.backend.cuda.linear import NormWeight
from llmsrv.backend.cuda.source import Kernels
from llmsrv.backend.cuda.weights import pack
from llmsrv.backend.cuda.weights import packed_bytes
from llmsrv.backend.quants.ggml_types import dequantize
from llmsrv.backend.quants.random_tensors import random_tensor
from llmsrv.backend.reference.operations import norm
from llmsrv.backend.reference.operations import softcapped
from tests.support.cuda import MODES
from tests.support.cuda import mode
from tests.support.cuda import needs_emulation
from tests.support.operations import random
from tests.support.parameters import slow_but

pytestmark = needs_emulation

FORMAT_TYPES = ["F16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"]
# With the type of T16: formats unpack integers to either in one of three ways.
FORMATS = [
    *((type, "float16") for type in FORMAT_TYPES),
    *((type, "bfloat16") for type in ("BF16", "Q8_0", "Q6_K")),
]
# Relative to the largest output.  Few rows multiply the file's own integers, many rows T16.
EXACT, ROUNDED = 1e-6, 5e-4


class Products:
    """Calls LinearKernels with numpy arrays, and computes the same in numpy.

    dtype  of T16
    """

    def __init__(self, cupy, dtype="float16", capability=80, is_batch_invariant=False):
        self.cupy, self.dtype = cupy, dtype
        device = Device(cupy, 0, "", capability, num_multiprocessors=2, max_shared_bytes=99 << 10)
        self.kernels = Kernels(cupy, **({"BFLOAT16": 1} if dtype == "bfloat16" else {}))
        self.linear = LinearKernels(self.kernels, device, is_batch_invariant)

    def rounded(self, x):
        """The values of x as T16 holds them."""
        if self.dtype == "float16":
            return x.astype(np.float16).astype(np.float32)
        bits = x.view(np.uint32)
        return (bits + 0x7FFF + (bits >> 16 & 1) >> 16 << 16).view(np.float32)

    def operand(self, x):
        padded = np.zeros((len(x), stride_of(x.shape[1])), np.float32)
        padded[:, : x.shape[1]] = x
        if self.dtype == "float16":
            return self.cupy.asarray(padded.astype(np.float16))
        return self.cupy.asarray((self.rounded(padded).view(np.uint32) >> 16).astype(np.uint16))

    def values(self, array, width):
        values = array.get()[:, :width]
        if values.dtype == np.uint16:
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32)

    def zeros(self, num_rows, width, is_operand=False):
        operand_type = np.float16 if self.dtype == "float16" else np.uint16
        dtype = operand_type if is_operand else np.float32
        return self.cupy.zeros((num_rows, stride_of(width)), dtype)

    def product(self, x, *tensors, is_paired=False, **options):
        """What linear() writes to zeros."""
        weights = pack(self.cupy, tensors, self.dtype, lambda: None, is_paired)
        assert weights.num_bytes == packed_bytes(tensors, is_paired)
        width = sum(tensor.shape[0] for tensor in tensors) // (1 + is_paired)
        out = self.zeros(len(x), width, is_operand=is_paired)
        x = self.cupy.asarray(x) if "norm" in options else self.operand(x)
        self.linear.linear(out, x, weights, len(x), **options)
        assert not out.get()[:, width:].any()
        return self.values(out, width)

    def norm_weight(self, weight, num_rows):
        normed = self.zeros(num_rows, len(weight), is_operand=True)
        return NormWeight(self.cupy.asarray(weight), 1e-5, normed)


def dequantized(tensor):
    values = np.empty(tensor.shape, np.float32)
    dequantize(tensor.type, tensor.data, values)
    return values


def assert_near(ours, theirs, error):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=error * np.abs(theirs).max())


def weight_of(type, rows, columns, seed=0):
    """As a file with this dtype and these formats would have them: no values are rounded."""
    return random_tensor(f"w{seed}", type, (rows, columns), seed, 0.5)


@pytest.mark.parametrize("format", slow_but(FORMATS, ("Q4_K", "float16")), ids=" ".join)
@pytest.mark.parametrize("num_rows", slow_but([1, 5, 8, 9, 32], 5))
def test_few_rows_lose_nothing_but_the_rounding_of_x(cupy, format, num_rows):
    type, dtype = format
    products = Products(cupy, dtype)
    columns = 3328 if type.endswith("_K") else 3296
    x, weight = random(num_rows, columns), weight_of(type, 45, columns)
    theirs = products.rounded(x) @ dequantized(weight).T
    assert_near(products.product(x, weight), theirs, 3 * EXACT)


@pytest.mark.parametrize("format", slow_but(FORMATS, ("F16", "float16")), ids=" ".join)
@pytest.mark.parametrize("num_rows", slow_but([33, 300], 33))
def test_many_rows(cupy, format, num_rows):
    """In small blocks, or large ones."""
    type, dtype = format
    products = Products(cupy, dtype)
    columns = 768 if type.endswith("_K") else 416
    x, weight = random(num_rows, columns), weight_of(type, 300, columns)
    theirs = products.rounded(x) @ dequantized(weight).T
    error = EXACT if type.endswith("F16") else ROUNDED * (8 if dtype == "bfloat16" else 1)
    assert_near(products.product(x, weight), theirs, error)


@pytest.mark.slow
@pytest.mark.parametrize("type", ["F16", "Q5_1"])
@pytest.mark.parametrize("num_rows", [3, 150])
def test_devices_without_asynchronous_copies(cupy, monkeypatch, type, num_rows):
    monkeypatch.setenv("CUDA_ON_CPU_CAPABILITY", "75")
    products = Products(cupy, capability=75)
    x, weight = random(num_rows, 416), weight_of(type, 300, 416)
    theirs = products.rounded(x) @ dequantized(weight).T
    assert_near(products.product(x, weight), theirs, ROUNDED)


@pytest.mark.slow
@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("type", ["F16", "Q6_K"])
@pytest.mark.parametrize("num_rows", [5, 20, 150])
def test_products_in_every_order_of_threads(cupy, how, type, num_rows):
    with mode(**MODES[how]):
        products = Products(cupy)
        columns = 1280 if type.endswith("_K") else 1056
        x, weight = random(num_rows, columns), weight_of(type, 150, columns)
        w = random(columns, seed=1)
        ours = products.product(x, weight, norm=products.norm_weight(w, num_rows))
        theirs = products.rounded(norm(x, w, 1e-5)) @ dequantized(weight).T
        assert_near(ours, theirs, ROUNDED)


@pytest.mark.parametrize("num_rows", slow_but([1, 3, 8, 20, 40], 3))
def test_a_norm_before_the_product(cupy, num_rows):
    products = Products(cupy)
    x, w, weight = random(num_rows, 576) * 3, random(576, seed=1), weight_of("Q8_0", 700, 576)
    ours = products.product(x, weight, norm=products.norm_weight(w, num_rows))
    assert_near(ours, products.rounded(norm(x, w, 1e-5)) @ dequantized(weight).T, ROUNDED)


@pytest.mark.slow
@pytest.mark.parametrize("num_rows", [3, 40])
def test_everything_that_may_follow_a_product(cupy, num_rows):
    products = Products(cupy)
    tensors = [weight_of(type, 45, 512, i) for i, type in enumerate(["F16", "Q8_0", "Q8_0"])]
    x, bias = random(num_rows, 512), random(135, seed=1)
    rows = np.concatenate([dequantized(tensor) for tensor in tensors])
    theirs = (products.rounded(x) @ rows.T + bias) * np.float32(0.5)
    bias = cupy.asarray(bias)
    capped = products.product(x, *tensors, bias=bias, scale=0.5, softcap=30.0)
    assert_near(capped, softcapped(theirs, 30.0), ROUNDED)
    before = random(num_rows, 160, seed=2)
    out = cupy.asarray(before)
    weights = pack(cupy, tensors, "float16", lambda: None)
    products.linear.linear(
        out, products.operand(x), weights, num_rows, bias=bias, scale=0.5, accumulate=True
    )
    before[:, :135] += theirs
    assert_near(out.get(), before, ROUNDED)


@pytest.mark.slow
@pytest.mark.parametrize("function", ["silu", "gelu"])
@pytest.mark.parametrize("num_rows", [3, 40])
def test_an_activation_beyond_the_range_of_float16_saturates(cupy, function, num_rows):
    products = Products(cupy)
    pair = [weight_of("F16", 21, 64, seed) for seed in (0, 1)]
    bias = np.full(42, 500, np.float32)
    x = random(num_rows, 64)
    ours = products.product(
        x, *pair, is_paired=True, gated=function, bias=cupy.asarray(bias), scale=2.0
    )
    np.testing.assert_array_equal(ours, 65504)


@pytest.mark.parametrize("is_batch_invariant", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_row_has_the_same_bits_in_any_number_of_rows(cupy, is_batch_invariant):
    """Batch-invariant: in any number; else up to 32, which one kernel computes."""
    products = Products(cupy, is_batch_invariant=is_batch_invariant)
    weight, w = weight_of("Q5_0", 100, 576), random(576, seed=1)
    x = random(300 if is_batch_invariant else 32, 576)

    def multiplied(some):
        return products.product(some, weight, norm=products.norm_weight(w, len(some)))

    together = multiplied(x)
    for count in (1, 2, 7, 8, 17, 31) + (130,) * is_batch_invariant:
        ours = multiplied(x[3 : 3 + count])
        np.testing.assert_array_equal(ours, together[3 : 3 + len(ours)])


def test_embeddings_of_ids_that_the_step_before_sampled(cupy):
    products = Products(cupy)
    table = weight_of("Q6_K", 45, 512)
    out = products.zeros(5, 512)
    ids = cupy.asarray(np.array([0, 44, -1, -2, -3], np.int32))
    sampled_ids = cupy.asarray(np.array([7, -1, 44], np.int32))  # the second row failed
    packed = pack(cupy, [table], "float16", lambda: None)
    products.linear.embed(out, packed, ids, sampled_ids, 5, 0.3)
    theirs = dequantized(table)[[0, 44, 7, 0, 44]] * np.float32(0.3)
    np.testing.assert_array_equal(out.get(), theirs)


def test_norms_and_conversions(cupy):
    products = Products(cupy)
    x, w = random(7, 1111), random(1111, seed=1)
    on_device = cupy.asarray(np.pad(x, ((0, 0), (0, 9))))
    operand, plain = products.zeros(7, 1111, is_operand=True), products.zeros(7, 1111)
    weight = cupy.asarray(w)
    theirs = norm(x, w, 1e-5)
    products.linear.norm(operand, on_device, weight, 1e-5, 7)
    assert_near(products.values(operand, 1111), theirs, ROUNDED)
    products.linear.norm(plain, on_device, weight, 1e-5, 7)
    products.linear.norm(plain, on_device, weight, 1e-5, 7, accumulate=True)
    assert_near(products.values(plain, 1111), 2 * theirs, EXACT)
    products.linear.convert(operand, on_device, 1111, 7)
    np.testing.assert_array_equal(products.values(operand, 1111), products.rounded(x))
