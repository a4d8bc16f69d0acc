"""The CPU backend in every instruction set that runs here, or can be emulated."""

import pytest

from llmsrv.backend.cpu import TIERS
from llmsrv.backend.cpu import CPUBackend
from llmsrv.backend.cpu import CPUOptions
from llmsrv.backend.source import cpu_features
from llmsrv.config import default_cache_dir
from tests.support.emulated import emulated_tiers


def tiers():
    """The best tier, and as slow tests the others."""
    usable = [tier for tier in TIERS if tier.needs <= cpu_features()]
    yield pytest.param(usable[0], id=usable[0].name)
    for tier in (*usable[1:], *emulated_tiers()):
        yield pytest.param(tier, id=tier.name, marks=pytest.mark.slow)


@pytest.fixture(scope="session", params=tiers())
def cpu(request):
    options = CPUOptions(default_cache_dir(), num_threads=2, tiers=(request.param,))
    return CPUBackend(options)
