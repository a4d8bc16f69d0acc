"""Peak memory while loading, and resident memory of a cache in use."""

import ctypes
import mmap
import platform
import sys
import threading
from pathlib import Path

import pytest

from llmsrv.backend.arrays import Array
from llmsrv.backend.base import Limits
from llmsrv.backend.base import Plan
from llmsrv.backend.cpu.backend import CPUBackend
from llmsrv.backend.cpu.backend import CPUOptions
from llmsrv.backend.cpu.cache_memory import AHEAD_BYTES
from llmsrv.backend.cpu.cache_memory import CacheMemory
from llmsrv.backend.cpu.library import Memory
from llmsrv.backend.cpu.library import address_of
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
    """Weights are packed while the file is mapped; its pages are dropped once they are packed."""
    path = request.getfixturevalue(model)
    loaded = open_in_a_fresh_process(__name__, "load", path)
    assert loaded.error == ""
    assert loaded.peak_bytes <= 1.2 * path.stat().st_size, loaded


def resident_bytes(array: Array) -> int:
    start = address_of(array) // mmap.PAGESIZE * mmap.PAGESIZE
    size = address_of(array) + array.nbytes - start
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), pages) == 0
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


def join_prefaulting() -> None:
    for thread in threading.enumerate():
        if thread.name == "kv-cache":
            thread.join()


def can_prefault() -> bool:
    release = platform.release().split(".")
    return sys.platform == "linux" and (int(release[0]), int(release[1])) >= (5, 14)


@pytest.mark.skipif(not can_prefault(), reason="needs Linux 5.14")
def test_the_next_part_of_a_cache_is_resident_before_its_use_and_the_rest_is_not(cpu):
    library = cpu._library
    cache = CacheMemory(library, Memory(library), (1000, 8, 4, 2048))
    ahead = AHEAD_BYTES // 2 // cache.keys[0].nbytes
    join_prefaulting()
    for array in (cache.keys, cache.values):
        assert resident_bytes(array[:ahead]) == array[:ahead].nbytes
        assert resident_bytes(array) < 2 * array[:ahead].nbytes
    cache.keys[ahead - 1] = 7
    cache.will_use(ahead - 1)
    join_prefaulting()
    for array in (cache.keys, cache.values):
        assert resident_bytes(array[: 2 * ahead]) == array[: 2 * ahead].nbytes
        assert resident_bytes(array) < 3 * array[:ahead].nbytes
    assert (cache.keys[ahead - 1] == 7).all()
    assert not cache.keys[ahead:].any()
