"""The backends: the CPU's in every instruction set that runs here or can be emulated, and CUDA's
with kernels that run on the CPU."""

import functools

import pytest

from llmsrv.backend.cpu.backend import CPUBackend
from llmsrv.backend.cpu.backend import CPUOptions
from llmsrv.backend.cpu.tiers import TIERS
from llmsrv.backend.cuda.backend import CUDABackend
from llmsrv.backend.cuda.backend import CUDAOptions
from llmsrv.backend.reference.backend import ReferenceBackend
from llmsrv.backend.source import cpu_features
from llmsrv.config import default_cache_dir
from tests.support.cuda import install_stand_in
from tests.support.cuda import needs_emulation
from tests.support.emulated import emulated_tiers


def tiers(bits):
    """The best tier with activations of `bits` bits, and the others as slow tests."""
    usable = [tier for tier in TIERS if tier.needs <= cpu_features()] + list(emulated_tiers())
    best, *others = [tier for tier in usable if bits == 16 or not tier.always_16_bits]
    yield pytest.param((bits, best), id=f"{best.name}, {bits} bits")
    for tier in others:
        yield pytest.param((bits, tier), id=f"{tier.name}, {bits} bits", marks=pytest.mark.slow)


@functools.cache
def cpu_backend(bits, tier):
    """Activations and KV cache are of `bits` bits."""
    options = CPUOptions(default_cache_dir(), 2 if bits == 16 else 3, bits, bits, (tier,))
    return CPUBackend(options)


@pytest.fixture(scope="session", params=tiers(16))
def cpu(request):
    return cpu_backend(*request.param)


@pytest.fixture(scope="session", params=tiers(8))
def cpu8(request):
    return cpu_backend(*request.param)


CUDA_MARKS = [needs_emulation, pytest.mark.slow]


@functools.cache
def cuda_backend(dtype, batch_invariant=False):
    install_stand_in()
    options = CUDAOptions(
        default_cache_dir(), dtype=dtype, batch_invariant=batch_invariant, warms_up=False
    )
    return CUDABackend(options)


def cuda_types():
    for dtype in ("float16", "bfloat16"):
        marks = [needs_emulation] + [pytest.mark.slow] * (dtype == "bfloat16")
        yield pytest.param((dtype,), id=f"CUDA, {dtype}", marks=marks)


@pytest.fixture(scope="session", params=cuda_types())
def cuda(request):
    """For tests that bfloat16's precision does not fail."""
    return cuda_backend(*request.param)


@pytest.fixture(scope="session")
def cuda16():
    """In float16."""
    return cuda_backend("float16")


@pytest.fixture(
    scope="session", params=[*tiers(16), pytest.param("cuda", id="CUDA", marks=CUDA_MARKS)]
)
def backend(request):
    """Every backend but the reference, in its most precise arithmetic.

    CUDA is slow here; tests/backend/cuda has quick tests of a few of the same cases."""
    return cuda_backend("float16") if request.param == "cuda" else cpu_backend(*request.param)


@pytest.fixture(
    scope="session",
    params=[pytest.param(None, id="reference"), *tiers(16), *tiers(8), *cuda_types()],
)
def any_backend(request):
    match request.param:
        case None:
            return ReferenceBackend()
        case (str(dtype),):
            return cuda_backend(dtype)
        case bits, tier:
            return cpu_backend(bits, tier)
