"""Devices.  Their number and capability come from the environment (cuda_on_cpu/options.py)."""

import threading
from typing import Any

from cuda_on_cpu import options

from cupy.cuda import runtime

__all__ = ["Device"]

ERROR_INVALID_DEVICE = 101

_current = threading.local()


def current_index() -> int:
    return getattr(_current, "index", 0)


class Device:
    def __init__(self, device: "int | Device | None" = None) -> None:
        self.id: int = current_index() if device is None else int(device)
        self._previous: list[int] = []

    def use(self) -> None:
        if not 0 <= self.id < options.num_devices():
            raise runtime.CUDARuntimeError(
                ERROR_INVALID_DEVICE, "cudaErrorInvalidDevice: invalid device ordinal"
            )
        _current.index = self.id

    def synchronize(self) -> None:
        runtime.deviceSynchronize()

    def __enter__(self) -> "Device":
        self._previous.append(current_index())
        self.use()
        return self

    def __exit__(self, *_: object) -> None:
        _current.index = self._previous.pop()

    def __int__(self) -> int:
        return self.id

    @property
    def compute_capability(self) -> str:
        return str(options.capability())

    @property
    def mem_info(self) -> tuple[int, int]:
        return runtime.memGetInfo()

    @property
    def pci_bus_id(self) -> str:
        return f"0000:0{self.id}:00.0"

    @property
    def attributes(self) -> dict[str, Any]:
        return {
            "MultiProcessorCount": 4,
            "MaxSharedMemoryPerBlock": 48 << 10,
            "MaxSharedMemoryPerBlockOptin": runtime.shared_memory_optin(),
            "MaxSharedMemoryPerMultiprocessor": runtime.shared_memory_optin() + 1024,
            "MaxRegistersPerMultiprocessor": 65536,
            "MaxThreadsPerBlock": 1024,
            "WarpSize": 32,
            "L2CacheSize": 4 << 20,
            "ComputeCapabilityMajor": options.capability() // 10,
            "ComputeCapabilityMinor": options.capability() % 10,
        }
