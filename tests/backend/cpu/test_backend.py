"""Which kernels the CPU backend accepts."""

import pytest

from llmsrv.backend.cpu.backend import CPUBackend
from llmsrv.backend.cpu.backend import CPUOptions
from llmsrv.backend.cpu.tiers import TIERS
from llmsrv.backend.cpu.tiers import Tier
from llmsrv.backend.source import load_library
from llmsrv.config import default_cache_dir


@pytest.mark.slow  # compiles everything once more
def test_kernels_that_disagree_with_the_reference_are_refused(monkeypatch, caplog):
    def load_some_wrong(sources, flags, *others):
        if "-DWRONG" in flags:
            wrong = sources["activation.h"].replace(b"(1) +", b"(2) +")
            sources = sources | {"activation.h": wrong}
        return load_library(sources, flags, *others)

    monkeypatch.setattr("llmsrv.backend.cpu.backend.load_library", load_some_wrong)
    tiers = Tier("wrong", frozenset(), ("-DWRONG",)), *TIERS
    backend = CPUBackend(CPUOptions(default_cache_dir(), threads=1, tiers=tiers))
    assert backend.tier.name != "wrong"
    assert "the wrong kernels are not used: in 'activated' they are off by" in caplog.text
