"""The CUDA runtime: devices and their memory."""

from cuda_on_cpu import options

__all__ = [
    "CUDARuntimeError",
    "deviceSynchronize",
    "driverGetVersion",
    "getDevice",
    "getDeviceCount",
    "getDeviceProperties",
    "memGetInfo",
    "runtimeGetVersion",
    "setDevice",
    "streamCaptureModeGlobal",
    "streamCaptureModeRelaxed",
    "streamCaptureModeThreadLocal",
]

streamCaptureModeGlobal = 0
streamCaptureModeThreadLocal = 1
streamCaptureModeRelaxed = 2


class CUDARuntimeError(RuntimeError):
    """cupy builds the message from a status; here the name of the error is given, too."""

    def __init__(self, status: int, message: str = "") -> None:
        super().__init__(message)
        self.status = status


def getDeviceCount() -> int:
    return options.num_devices()


def driverGetVersion() -> int:
    return options.driver_version()


def runtimeGetVersion() -> int:
    return 13000


def memGetInfo() -> tuple[int, int]:
    """Free bytes, and all there are.  Memory that a pool holds is not free."""
    from cupy.cuda.memory import get_default_memory_pool

    total = options.memory_bytes()
    return total - get_default_memory_pool().total_bytes(), total


def getDevice() -> int:
    from cupy.cuda.device import current_index

    return current_index()


def setDevice(device: int) -> None:
    from cupy.cuda.device import Device

    Device(device).use()


def deviceSynchronize() -> None:
    from cupy.cuda.stream import synchronize_all

    synchronize_all()


def getDeviceProperties(device: int) -> dict[str, object]:
    return {
        "name": b"Emulated",
        "major": options.capability() // 10,
        "minor": options.capability() % 10,
        "multiProcessorCount": 4,
        "totalGlobalMem": options.memory_bytes(),
        "l2CacheSize": 4 << 20,
        "sharedMemPerBlockOptin": shared_memory_optin(),
    }


def shared_memory_optin() -> int:
    """Most dynamic shared memory of a block, in bytes.

    Source: CUDA C++ Programming Guide, "Technical specifications per compute capability".
    """
    kib = {75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}
    return kib[options.capability()] << 10
