"""The backends, each in every instruction set that runs here or can be emulated."""

import functools

import pytest

from llmsrv.backend.cpu.backend import CPUBackend
from llmsrv.backend.cpu.backend import CPUOptions
from llmsrv.backend.cpu.tiers import TIERS
from llmsrv.backend.reference.backend import ReferenceBackend
from llmsrv.backend.source import cpu_features
from llmsrv.config import default_cache_dir
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


@pytest.fixture(
    scope="session", params=[pytest.param(None, id="reference"), *tiers(16), *tiers(8)]
)
def any_backend(request):
    return cpu_backend(*request.param) if request.param else ReferenceBackend()
