"""Finds the GPU to compute on and imports CuPy, or says in one sentence why that is impossible."""

import importlib.metadata
import logging
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmsrv.backend.base import CannotRun
from llmsrv.backend.cuda.driver import Driver
from llmsrv.backend.cuda.driver import query_driver
from llmsrv.backend.source import private_directory
from llmsrv.errors import StartupError

log = logging.getLogger("llmsrv.backend")

MIN_CAPABILITY = 75  # mma of float16 in the shape m16n8k8; CUDA 13 begins there too
BFLOAT16_CAPABILITY = 80
# Package of CuPy -> the version of CUDA that it needs, and the extra that installs it.
PACKAGES = {"cupy-cuda12x": (12000, "cuda12"), "cupy-cuda13x": (13000, "cuda13")}
OTHER_PACKAGES = ("cupy", "cupy-cuda11x", "cupy-cuda112", "amd-cupy")
NVRTC_TRIAL = '#include <cuda_fp16.h>\nextern "C" __global__ void trial(__half *x) { *x = 0.0f; }\n'


@dataclass(frozen=True)
class Device:
    """The GPU to compute on.

    cp                   the cupy module; other modules of this package get it from here
    index                N of cuda:N
    name                 of the card
    capability           its compute capability, 90 for 9.0
    num_multiprocessors  streaming multiprocessors
    max_shared_bytes     the most dynamic shared memory that a block may ask for
    """

    cp: Any
    index: int
    name: str
    capability: int
    num_multiprocessors: int
    max_shared_bytes: int

    @property
    def has_bfloat16(self) -> bool:
        return self.capability >= BFLOAT16_CAPABILITY

    def memory_bytes(self) -> tuple[int, int]:
        """Free bytes, and all there are."""
        with self.cp.cuda.Device(self.index):
            free, total = self.cp.cuda.runtime.memGetInfo()
        return int(free), int(total)


def open_device(name: str, cache_dir: Path) -> Device:
    """Makes cuda:N the current device and returns it.

    cache_dir  compiled kernels are cached in its folder `cuda`
    Raises CannotRun with the reason.
    """
    driver = query_driver()
    index = _index(name, driver)
    chosen = driver.devices[index]
    if chosen.capability < MIN_CAPABILITY:
        raise CannotRun(
            f"{name} is a {chosen.name} of compute capability {_dotted(chosen.capability)}; "
            f"{_dotted(MIN_CAPABILITY)} or higher is needed"
        )
    package = _package(driver)
    is_cached = _cache_in(cache_dir / "cuda")
    cp = _import_cupy(package)
    if not is_cached:
        log.info("compiling the kernels for the %s", chosen.name)
    try:
        cp.cuda.Device(index).use()
        attributes = cp.cuda.Device(index).attributes
        device = Device(
            cp,
            index,
            chosen.name,
            chosen.capability,
            int(attributes["MultiProcessorCount"]),
            int(attributes["MaxSharedMemoryPerBlockOptin"]),
        )
        device.memory_bytes()
    except cp.cuda.runtime.CUDARuntimeError as error:
        raise CannotRun(f"{name} ({chosen.name}) does not work: {error}") from error
    _try_compiler(cp, package)
    return device


def _index(name: str, driver: Driver) -> int:
    """N of cuda:N."""
    match = re.fullmatch(r"cuda(?::(\d+))?", name)
    if match is None:
        raise StartupError(f"--device must be cuda:N, such as cuda:0, got '{name}'")
    index, count = int(match[1] or 0), len(driver.devices)
    if index >= count:
        devices = "is 1 GPU, cuda:0" if count == 1 else f"are {count} GPUs, up to cuda:{count - 1}"
        raise StartupError(f"there is no {name}; there {devices}")
    return index


def _package(driver: Driver) -> str:
    """The one package of CuPy that is installed; CannotRun if it does not suit the driver."""
    installed = [name for name in (*PACKAGES, *OTHER_PACKAGES) if _is_installed(name)]
    driver_runs = f"the NVIDIA driver runs CUDA up to {_cuda(driver.cuda_version)}"
    fitting = [name for name, (needed, _) in PACKAGES.items() if needed <= driver.cuda_version]
    if not fitting:
        raise CannotRun(f"{driver_runs}; 12.0 or higher is needed: install a newer driver")
    install = f"pip install 'llmsrv[{PACKAGES[fitting[-1]][1]}]'"
    if not installed:
        raise CannotRun(f"the GPU is not used, because CuPy is not installed; run: {install}")
    if len(installed) > 1:
        names = " ".join(installed)
        raise CannotRun(
            f"{len(installed)} packages of CuPy are installed, which break each other; "
            f"run: pip uninstall {names}; then: {install}"
        )
    [package] = installed
    if package in PACKAGES and package not in fitting:
        raise CannotRun(
            f"{driver_runs}, but {package} needs {_cuda(PACKAGES[package][0])}; install a newer "
            f"driver, or run: pip uninstall {package}; then: {install}"
        )
    return package


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _cache_in(directory: Path) -> bool:
    """Lets CuPy cache compiled kernels there, if no other user can write to it.

    Returns whether there are any."""
    os.environ["CUPY_CACHE_DIR"] = str(directory)
    if private_directory(directory) is None:
        os.environ["CUPY_CACHE_IN_MEMORY"] = "1"
        return False
    return any(directory.iterdir())


def _import_cupy(package: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of parts that we do not use
            import cupy
    except ImportError as error:
        reason = first_line(error)
        raise CannotRun(f"{package} is installed but cannot be imported: {reason}") from error
    return cupy


def _try_compiler(cp: Any, package: str) -> None:
    """Raises CannotRun if NVRTC or CUDA's own headers are missing."""
    try:
        cp.RawModule(code=NVRTC_TRIAL, options=("-std=c++17",)).get_function("trial")
    except Exception as error:  # CuPy raises RuntimeError, ImportError, CompileException ...
        extra = PACKAGES.get(package, (0, "cuda13"))[1]
        raise CannotRun(
            "CUDA's compiler NVRTC or its headers do not work or are not installed "
            f"({first_line(error)}); run: pip install 'llmsrv[{extra}]'"
        ) from error


def first_line(error: Exception) -> str:
    """The first line of its message that says something."""
    lines = [line for line in str(error).splitlines() if line.strip(" =-")]
    return lines[0].strip() if lines else type(error).__name__


def _cuda(version: int) -> str:
    """13000 -> 13.0"""
    return f"{version // 1000}.{version % 1000 // 10}"


def _dotted(capability: int) -> str:
    return f"{capability // 10}.{capability % 10}"
