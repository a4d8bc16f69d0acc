"""What memory loading takes at its peak."""

import sys
from pathlib import Path

import pytest

from llmsrv.backend.base import Limits
from llmsrv.backend.base import Plan
from llmsrv.backend.cpu import CPUBackend
from llmsrv.backend.cpu import CPUOptions
from llmsrv.config import default_cache_dir
from llmsrv.model.load import load_model
from tests.support.fresh_process import open_in_a_fresh_process

LIMITS = Limits(max_rows=64, max_logit_rows=8, max_slots=8, num_blocks=2)


def load(path: Path) -> Plan:
    program = load_model(path, lambda: None).program
    return CPUBackend(CPUOptions(default_cache_dir())).compile(program, LIMITS, lambda: None)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="pages of files are dropped on Linux")
@pytest.mark.parametrize("model", ["smollm2", "gemma3"])
def test_loading_takes_little_more_memory_than_the_file(model, request):
    """Weights are packed beside the mapped file; pages that are done with are dropped at once."""
    path = request.getfixturevalue(model)
    loaded = open_in_a_fresh_process(__name__, "load", path)
    assert loaded.error == ""
    assert loaded.peak_bytes <= 1.2 * path.stat().st_size, loaded
