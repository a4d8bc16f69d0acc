"""The CUDA backend without a GPU: the stand-in for cupy of tests/cuda_on_cpu, and a driver.

In this process, install_stand_in() makes `import cupy` import the stand-in, and mode() sets how
kernels run.  A process that a test starts gets both from environment().
"""

import contextlib
import ctypes
import importlib
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

CUDA_ON_CPU = Path(__file__).parents[1] / "cuda_on_cpu"
SITE = CUDA_ON_CPU / "site"

# How kernels run -> fields of cuda_on_cpu.options.Options.  Each finds errors that others do not.
MODES: dict[str, dict[str, Any]] = {
    "in order": {},
    "reversed": {"order": "reversed"},
    "random": {"order": "random"},
    "checked": {"is_checked": True},
    "lazy": {"is_lazy": True},
}

needs_emulation = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None,
    reason="the emulation of CUDA needs g++ on x86-64",
)


def install_stand_in() -> Any:
    """Returns the stand-in; from now on `import cupy` imports it.

    Raises RuntimeError if this process has imported the real cupy.
    """
    if str(SITE) not in sys.path:
        sys.path.insert(0, str(SITE))
        importlib.invalidate_caches()
    cupy = importlib.import_module("cupy")
    if SITE not in Path(str(cupy.__file__)).parents:
        raise RuntimeError(f"cupy is imported from {cupy.__file__}")
    load_driver()
    return cupy


@cache
def load_driver() -> ctypes.CDLL:
    """Loads our libcuda.so.1, which ctypes.CDLL("libcuda.so.1") in this process then returns."""
    return ctypes.CDLL(str(driver_directory() / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)


@cache
def driver_directory() -> Path:
    """Compiles our libcuda.so.1, unless the cache has it, and returns its directory."""
    if str(SITE) not in sys.path:
        sys.path.insert(0, str(SITE))
    build = importlib.import_module("cuda_on_cpu.build")
    return Path(build.driver_library()).parent


def environment(
    *,
    order: str = "in_order",
    seed: int = 1,
    is_checked: bool = False,
    is_lazy: bool = False,
    num_devices: int = 1,
    driver: int = 13000,
    capability: int = 80,
    memory_mib: int = 1024,
    init_result: int = 0,
) -> dict[str, str]:
    """os.environ for a process whose cupy is the stand-in, and whose driver is ours.

    driver       the newest version of CUDA that the driver runs, 13000 for 13.0
    init_result  what cuInit returns, a CUresult
    """
    build = importlib.import_module("cuda_on_cpu.build")
    paths = {"PYTHONPATH": SITE, "LD_LIBRARY_PATH": driver_directory()}
    return (
        os.environ
        | {name: os.pathsep.join(_with(path, name)) for name, path in paths.items()}
        | {
            "CUDA_ON_CPU_CACHE": str(build.cache_directory()),
            "CUDA_ON_CPU_ORDER": order,
            "CUDA_ON_CPU_SEED": str(seed),
            "CUDA_ON_CPU_CHECK": str(int(is_checked)),
            "CUDA_ON_CPU_LAZY": str(int(is_lazy)),
            "CUDA_ON_CPU_DEVICES": str(num_devices),
            "CUDA_ON_CPU_DRIVER": str(driver),
            "CUDA_ON_CPU_CAPABILITY": str(capability),
            "CUDA_ON_CPU_MEMORY_MIB": str(memory_mib),
            "CUDA_ON_CPU_INIT_RESULT": str(init_result),
        }
    )


def _with(path: Path, name: str) -> list[str]:
    before = os.environ.get(name)
    return [str(path), *([before] if before else [])]


@contextlib.contextmanager
def mode(**fields: Any) -> Iterator[None]:
    """Runs kernels with these options, in this process.

    A module is compiled for the options at its first use, so make the kernels inside.
    """
    install_stand_in()
    options = importlib.import_module("cuda_on_cpu.options").options
    before = vars(options).copy()
    vars(options).update(fields)
    try:
        yield
    finally:
        vars(options).update(before)


@pytest.fixture
def cupy() -> Any:
    return install_stand_in()


@pytest.fixture(params=MODES)
def every_mode(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs once in each mode."""
    with mode(**MODES[request.param]):
        yield request.param


def launch(
    code: str,
    name: str,
    arguments: tuple[Any, ...],
    *,
    grid: int = 1,
    block: int = 32,
    shared_mem: int = 0,
    options: tuple[str, ...] = (),
) -> None:
    """Compiles the kernel in the current mode and launches it."""
    kernel = install_stand_in().RawModule(code=code, options=options).get_function(name)
    kernel((grid,), (block,), arguments, shared_mem=shared_mem)
