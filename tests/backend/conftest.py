"""The CPU backend in every instruction set that runs here, or can be emulated."""

import pytest

from llmsrv.backend.cpu.backend import CPUBackend
from llmsrv.backend.cpu.backend import CPUOptions
from llmsrv.backend.cpu.backend import TIERS
from llmsrv.backend.source import cpu_features
from llmsrv.config import default_cache_dir
from tests.support.emulated import emulated_tiers


def tiers(bits):
    """The best tier, and as slow tests the others."""
    usable = [tier for tier in TIERS if tier.needs <= cpu_features()] + list(emulated_tiers())
    best, *others = [tier for tier in usable if bits == 16 or not tier.always_16_bits]
    yield pytest.param(best, id=best.name)
    for tier in others:
        yield pytest.param(tier, id=tier.name, marks=pytest.mark.slow)


@pytest.fixture(scope="session", params=tiers(16))
def cpu(request):
    options = CPUOptions(default_cache_dir(), threads=2, tiers=(request.param,))
    return CPUBackend(options)


@pytest.fixture(scope="session", params=tiers(8))
def cpu8(request):
    options = CPUOptions(default_cache_dir(), 3, 8, kv_cache_bits=8, tiers=(request.param,))
    return CPUBackend(options)
