"""Devices, memory, streams and graphs."""

from cupy.cuda import compiler
from cupy.cuda import device
from cupy.cuda import driver
from cupy.cuda import graph
from cupy.cuda import memory
from cupy.cuda import pinned_memory
from cupy.cuda import runtime
from cupy.cuda import stream
from cupy.cuda.device import Device
from cupy.cuda.memory import MemoryPool
from cupy.cuda.pinned_memory import PinnedMemoryPointer
from cupy.cuda.pinned_memory import alloc_pinned_memory
from cupy.cuda.stream import Event
from cupy.cuda.stream import Stream
from cupy.cuda.stream import get_current_stream
from cupy.cuda.stream import get_elapsed_time

__all__ = [
    "Device",
    "Event",
    "MemoryPool",
    "PinnedMemoryPointer",
    "Stream",
    "alloc_pinned_memory",
    "compiler",
    "device",
    "driver",
    "get_current_stream",
    "get_elapsed_time",
    "graph",
    "is_available",
    "memory",
    "pinned_memory",
    "runtime",
    "stream",
]


def is_available() -> bool:
    return runtime.getDeviceCount() > 0
