"""Functions of the sampling kernels, to the bit: errors of one rounding rarely change an id."""

import numpy as np
import pytest

from llmsrv.backend.cuda.source import compile_options
from llmsrv.backend.cuda.source import pasted
from llmsrv.backend.sampling.philox import uniform_bits
from llmsrv.backend.sampling.reference_sampler import weights_of
from llmsrv.backend.sampling.table import SamplingParameters
from llmsrv.backend.sampling.table import SamplingTable
from llmsrv.backend.source import kernel_sources
from tests.support.cuda import install_stand_in
from tests.support.cuda import needs_emulation

pytestmark = needs_emulation

CALLS = """
#include "philox.cuh"
#include "sample.cuh"

extern "C" __global__ void weights(const float *x, Mass *out, int size)
{
    for (int i = threadIdx.x; i < size; i += blockDim.x)
        out[i] = weight_of(x[i]);
}

extern "C" __global__ void keys(const float *values, unsigned *out, float *back, int size)
{
    for (int i = threadIdx.x; i < size; i += blockDim.x) {
        out[i] = ascending_key(values[i]);
        back[i] = value_of_key(out[i]);
    }
}

extern "C" __global__ void penalties(
    const float *values, const int *counts, const Parameters *parameters, float *out, int size)
{
    for (int i = threadIdx.x; i < size; i += blockDim.x)
        out[i] = penalized(values[i], *parameters, counts[i]);
}

extern "C" __global__ void bits(
    const Mass *seeds, const unsigned *choices, const Mass *positions, Mass *out, int size)
{
    for (int i = threadIdx.x; i < size; i += blockDim.x)
        out[i] = uniform_bits(seeds[i], choices[i], positions[i]);
}
"""


@pytest.fixture(scope="module")
def call():
    """Calls a kernel above on host arrays; returns the results of the given types."""
    cp = install_stand_in()
    sources = {name: text.decode() for name, text in kernel_sources("cuda").items()}
    code = pasted("calls.cu", sources | {"calls.cu": CALLS})
    module = cp.RawModule(code=code, options=compile_options({}))

    def run(name, *arrays, types):
        size = len(arrays[0])
        results = [cp.zeros(size, dtype) for dtype in types]
        arguments = *map(cp.asarray, arrays), *results, np.int32(size)
        module.get_function(name)((1,), (64,), arguments)
        return [result.get() for result in results]

    return run


def test_weights_are_those_of_the_contract(call):
    rng = np.random.default_rng(0)
    half_steps = -np.arange(0.5, 40.5) * np.log(2)  # where the power of two changes
    x = -rng.uniform(0, 28, 20_000), half_steps, -rng.uniform(0, 1e-3, 1000), [-28, -27.7, -0.0]
    x = np.concatenate(x).astype(np.float32)
    [weights] = call("weights", x, types=[np.uint64])
    np.testing.assert_array_equal(weights, weights_of(x))


def test_x_below_the_least_weighs_nothing(call):
    x = np.array([np.nextafter(np.float32(-28), -30), -1e30, -np.inf, np.nan], np.float32)
    assert call("weights", x, types=[np.uint64])[0].tolist() == [0, 0, 0, 0]


def test_keys_ascend_with_the_values(call):
    values = np.random.default_rng(1).normal(0, 9, 500).astype(np.float32)
    values = np.sort(np.concatenate([values, [-np.inf, np.inf, 3e38, -3e38, 0]]).astype(np.float32))
    keys, back = call("keys", values, types=[np.uint32, np.float32])
    assert (np.diff(keys.astype(np.int64)) > 0).all()
    np.testing.assert_array_equal(back, values)
    zeros = np.array([0.0, -0.0], np.float32)
    assert len(set(call("keys", zeros, types=[np.uint32, np.float32])[0].tolist())) == 1


def test_penalties_round_each_operation(call):
    rng = np.random.default_rng(2)
    values = rng.normal(0, 5, 5000).astype(np.float32)
    counts = rng.integers(0, 40, 5000).astype(np.int32)
    repetition, presence, frequency = np.float32([1.3, 0.7, 0.1])
    [ours] = call("penalties", values, counts, parameters(1.3, 0.7, 0.1), types=[np.float32])
    wanted = np.where(values > 0, values / repetition, values * repetition)
    seen = counts > 0
    wanted[seen] -= presence
    wanted[seen] -= frequency * counts[seen].astype(np.float32)
    np.testing.assert_array_equal(ours, wanted)


def parameters(repetition, presence, frequency):
    """A row of the table, as the words of an array."""
    table = SamplingTable(1, 10)
    values = SamplingParameters(
        repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency
    )
    table.set(0, values)
    return table.parameters.view(np.uint8)


def test_random_bits_are_those_of_philox(call):
    rng = np.random.default_rng(3)
    seeds, positions = rng.integers(0, 2**63, (2, 200), np.uint64) * 2 + 1
    choices = rng.integers(0, 2**32, 200).astype(np.uint32)
    [bits] = call("bits", seeds, choices, positions, types=[np.uint64])
    columns = (array.tolist() for array in (seeds, choices, positions))
    assert bits.tolist() == [uniform_bits(*row) for row in zip(*columns, strict=True)]
