"""What the NVIDIA driver says of itself and its devices, by ctypes and in under a millisecond.

Used before cupy is imported: without a driver, its import would only be wasted time.
Source: CUDA Driver API reference, initialization, version and device management.
"""

import ctypes
from dataclasses import dataclass

from llmsrv.backend.base import CannotRun

LIBRARY = "libcuda.so.1"
SUCCESS = 0  # CUresult
ERROR_NO_DEVICE = 100
COMPUTE_CAPABILITY_MAJOR = 75  # CUdevice_attribute
COMPUTE_CAPABILITY_MINOR = 76
NAME_BYTES = 256


class NoDriver(CannotRun):
    """There is no NVIDIA driver at all: an ordinary machine, and nothing to warn of."""

    is_ordinary = True


@dataclass(frozen=True)
class DriverDevice:
    """name: of the card; capability: its compute capability, 90 for 9.0"""

    name: str
    capability: int


@dataclass(frozen=True)
class Driver:
    """cuda_version: the newest version of CUDA that it runs, 13000 for 13.0"""

    cuda_version: int
    devices: tuple[DriverDevice, ...]


def query_driver() -> Driver:
    """Raises NoDriver, or CannotRun if the driver does not work or finds no device."""
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError:
        raise NoDriver("no GPU is used: there is no NVIDIA driver") from None
    result = library.cuInit(0)
    if result != SUCCESS and result != ERROR_NO_DEVICE:
        raise CannotRun(f"the NVIDIA driver does not work: {_error(library, result)}")
    count = 0 if result else _int(library, library.cuDeviceGetCount)
    if count == 0:
        raise CannotRun("the NVIDIA driver finds no GPU")
    version = _int(library, library.cuDriverGetVersion)
    return Driver(version, tuple(_device(library, index) for index in range(count)))


def _device(library: ctypes.CDLL, index: int) -> DriverDevice:
    device = _int(library, library.cuDeviceGet, index)
    name = ctypes.create_string_buffer(NAME_BYTES)
    _check(library, library.cuDeviceGetName(name, NAME_BYTES, device))
    major, minor = (
        _int(library, library.cuDeviceGetAttribute, attribute, device)
        for attribute in (COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR)
    )
    return DriverDevice(name.value.decode(), 10 * major + minor)


def _int(library: ctypes.CDLL, function: "ctypes._NamedFuncPointer", *arguments: int) -> int:
    """The integer that the function writes to its first argument."""
    value = ctypes.c_int()
    _check(library, function(ctypes.byref(value), *arguments))
    return value.value


def _check(library: ctypes.CDLL, result: int) -> None:
    if result != SUCCESS:
        raise CannotRun(f"the NVIDIA driver does not work: {_error(library, result)}")


def _error(library: ctypes.CDLL, result: int) -> str:
    text = ctypes.c_char_p()
    known = library.cuGetErrorString(result, ctypes.byref(text)) == SUCCESS and text.value
    return f"{text.value.decode()} (error {result})" if known and text.value else f"error {result}"
