"""float16 and bfloat16: conversions, arithmetic and rounding, against numpy over all values."""

import numpy as np
import pytest

from tests.support.cuda import launch
from tests.support.cuda import needs_emulation

pytestmark = needs_emulation

CODE = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>

extern "C" __global__ void half_to_float(float *out, const __half *x, int n)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n)
        out[i] = __half2float(x[i]);
}

extern "C" __global__ void float_to_half(__half *nearest, __half *to_zero, const float *x, int n)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        nearest[i] = __float2half_rn(x[i]);
        to_zero[i] = __float2half_rz(x[i]);
    }
}

extern "C" __global__ void float_to_bfloat16(__nv_bfloat16 *out, const float *x, int n)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n)
        out[i] = __float2bfloat16_rn(x[i]);
}

extern "C" __global__ void half_arithmetic(__half2 *out, const __half2 *x, int n)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n)
        return;
    __half2 a = x[i], b = x[(i + 1) % n], c = x[(i + 2) % n];
    out[i] = __hadd2(a, b);
    out[n + i] = a - b;
    out[2 * n + i] = __hmul2(a, b);
    out[3 * n + i] = __hfma2(a, b, c);
    out[4 * n + i] = __halves2half2(a.x / b.x, __hmax(a.y, b.y));
}
"""
BITS = np.arange(1 << 16, dtype=np.uint16)
FINITE = BITS[np.isfinite(BITS.view(np.float16))]


@pytest.fixture
def floats():
    """Values over the range of float16, halfway cases, and what is outside."""
    rng = np.random.default_rng(0)
    exact = FINITE.view(np.float16).astype(np.float32)
    halfway = (exact[:-1] + exact[1:]) / 2
    wide = rng.standard_normal(10000) * 10.0 ** rng.integers(-10, 10, 10000)
    return np.concatenate([exact, halfway, wide.astype(np.float32)])


def run(cupy, name, outputs, x):
    n = len(x)
    launch(CODE, name, (*outputs, cupy.asarray(x), np.int32(n)), grid=-(-n // 256), block=256)
    return [output.get() for output in outputs]


def same(a, b):
    return bool(((a == b) | (np.isnan(a) & np.isnan(b))).all())


def test_every_float16_becomes_its_float(cupy):
    [out] = run(cupy, "half_to_float", [cupy.empty(1 << 16, np.float32)], BITS.view(np.float16))
    assert same(out, BITS.view(np.float16).astype(np.float32))


def test_floats_round_to_the_nearest_float16_or_toward_zero(cupy, floats):
    outputs = [cupy.empty(len(floats), np.float16) for _ in range(2)]
    nearest, to_zero = run(cupy, "float_to_half", outputs, floats)
    with np.errstate(over="ignore"):
        wanted = floats.astype(np.float16)
    assert same(nearest, wanted)
    inside = np.abs(floats) < 65504
    assert (np.abs(to_zero[inside].astype(np.float32)) <= np.abs(floats[inside])).all()
    larger = (to_zero.view(np.uint16) + np.uint16(1)).view(np.float16)  # in magnitude
    assert (np.abs(larger[inside].astype(np.float32)) > np.abs(floats[inside])).all()


def test_floats_round_to_the_nearest_bfloat16(cupy, floats):
    [out] = run(cupy, "float_to_bfloat16", [cupy.empty(len(floats), np.uint16)], floats)
    below = (floats.view(np.uint32) >> 16).astype(np.uint64)
    low, high = ((bits << 16).astype(np.uint32).view(np.float32) for bits in (below, below + 1))
    middle = (low.astype(np.float64) + high) / 2
    up = (np.abs(floats) > np.abs(middle)) | ((floats == middle) & (below % 2 == 1))
    normal = np.abs(floats) > 1e-37  # kernels flush smaller ones
    assert (out[normal] == (below + up)[normal]).all()


def test_float16_arithmetic_rounds_once(cupy):
    values = np.random.default_rng(0).permutation(FINITE).view(np.float16)
    values = values[np.abs(values) < 200][:20000]
    pairs = values.reshape(-1, 2)
    n = len(pairs)
    out = cupy.empty((5, n, 2), np.float16)
    arguments = out, cupy.asarray(pairs), np.int32(n)
    launch(CODE, "half_arithmetic", arguments, grid=-(-n // 256), block=256)
    a, b, c = (np.roll(pairs, -i, axis=0) for i in range(3))
    got = out.get()
    with np.errstate(divide="ignore", over="ignore"):
        assert same(got[0], a + b)
        assert same(got[1], a - b)
        assert same(got[2], a * b)
        exact = a.astype(np.float64) * b + c
        assert same(got[3], exact.astype(np.float16))
        assert same(got[4, :, 0], a[:, 0] / b[:, 0])
    assert same(got[4, :, 1], np.maximum(a[:, 1], b[:, 1]))
