"""How kernels run, and what device there seems to be.

Both come from environment variables, so that they also reach engine processes.
"""

import os
from dataclasses import dataclass

ORDERS = ("in_order", "reversed", "random")  # as in emulator.h


@dataclass
class Options:
    """How kernels run.

    order       of blocks, warps and lanes, one of ORDERS
    seed        of the random order
    is_checked  find races, accesses out of bounds and uninitialised shared memory; slow
    is_lazy     run a stream's work only when the host waits for it
    workers     OS threads that share the blocks of a launch; a checked launch uses one
    """

    order: str = "in_order"
    seed: int = 1
    is_checked: bool = False
    is_lazy: bool = False
    workers: int = 1


def options_from_environment() -> Options:
    get = os.environ.get
    order = get("CUDA_ON_CPU_ORDER", "in_order")
    if order not in ORDERS:
        raise ValueError(f"CUDA_ON_CPU_ORDER must be one of {', '.join(ORDERS)}, got {order}")
    return Options(
        order,
        int(get("CUDA_ON_CPU_SEED", "1")),
        get("CUDA_ON_CPU_CHECK", "0") == "1",
        get("CUDA_ON_CPU_LAZY", "0") == "1",
        int(get("CUDA_ON_CPU_WORKERS", "1")),
    )


def capability() -> int:
    """The device's compute capability, 80 for 8.0.  libcuda.c reads the same variables."""
    return int(os.environ.get("CUDA_ON_CPU_CAPABILITY", "80"))


def memory_bytes() -> int:
    return int(os.environ.get("CUDA_ON_CPU_MEMORY_MIB", "1024")) << 20


def num_devices() -> int:
    return int(os.environ.get("CUDA_ON_CPU_DEVICES", "1"))


def driver_version() -> int:
    return int(os.environ.get("CUDA_ON_CPU_DRIVER", "13000"))


options = options_from_environment()


class EmulationError(Exception):
    """A kernel or its caller did what is an error on a device, or may be one.

    The classes of cupy's own errors are for what cupy itself reports.
    """
