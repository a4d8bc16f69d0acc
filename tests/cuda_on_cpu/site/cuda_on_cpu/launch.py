"""Launches a compiled kernel, and raises what the emulator and the checker found."""

import ctypes
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cuda_on_cpu.build import INCLUDE
from cuda_on_cpu.build import Kernel
from cuda_on_cpu.build import Module
from cuda_on_cpu.build import runtime
from cuda_on_cpu.options import ORDERS
from cuda_on_cpu.options import EmulationError
from cuda_on_cpu.options import options

REPORT_BYTES = 1 << 16


class LaunchOptions(ctypes.Structure):
    """emu_options of emulator.h"""

    _fields_ = [
        ("workers", ctypes.c_int),
        ("order", ctypes.c_int),
        ("seed", ctypes.c_int),
        ("is_checked", ctypes.c_int),
        ("max_dynamic_shared", ctypes.c_uint),
    ]


@dataclass
class Argument:
    """One argument of a kernel, by value.

    kind    p: pointer, f: floating point, i: integer, s: struct
    extent  of the array that a pointer points to: first address and number of bytes
    """

    value: Any  # a ctypes object
    kind: str
    extent: tuple[int, int] | None = None


class LaunchRefused(Exception):
    """What cuLaunchKernel itself refuses."""


def check_arguments(kernel: Kernel, arguments: Sequence[Argument]) -> None:
    """cupy passes arguments unchecked; a wrong size or kind is garbage in the kernel."""
    name = kernel.name.decode()
    if len(arguments) != kernel.num_arguments:
        raise EmulationError(
            f"{name}: {len(arguments)} arguments for {kernel.num_arguments} parameters"
        )
    for i, argument in enumerate(arguments):
        size, kind = ctypes.sizeof(argument.value), chr(kernel.kinds[i])
        is_null = kind == "p" and argument.kind == "i" and not any(bytes(argument.value))
        if size != kernel.sizes[i] or (argument.kind != kind and not is_null):
            raise EmulationError(
                f"{name}: argument {i} has kind {argument.kind} and {size} bytes; the parameter "
                f"has kind {kind} and {kernel.sizes[i]} bytes"
            )


def launch(
    module: Module,
    kernel: Kernel,
    grid: Sequence[int],
    block: Sequence[int],
    arguments: Sequence[Argument],
    dynamic_shared: int,
    max_dynamic_shared: int,
    max_shared: int,
) -> None:
    """Runs all blocks.  Sizes of shared memory are in bytes; max_shared includes static objects.

    Raises LaunchRefused, or EmulationError with all that was found.
    """
    library, name = runtime(), kernel.name.decode()
    pointers = (ctypes.c_void_p * max(1, len(arguments)))(
        *(ctypes.addressof(argument.value) for argument in arguments)
    )
    launch_options = LaunchOptions(
        1 if options.is_checked else options.workers,
        ORDERS.index(options.order),
        options.seed,
        options.is_checked,
        max_dynamic_shared,
    )
    error = ctypes.create_string_buffer(4096)
    if options.is_checked:
        _begin_check(library, module, kernel, arguments, pointers)
    failed = library.emu_launch(
        ctypes.byref(kernel),
        pointers,
        (ctypes.c_uint * 3)(*grid),
        (ctypes.c_uint * 3)(*block),
        ctypes.c_uint(dynamic_shared),
        ctypes.c_uint(max_shared),
        ctypes.byref(launch_options),
        error,
        len(error),
    )
    found = _end_check(library, module.path) if options.is_checked else []
    if failed:
        text = error.value.decode()
        if text.startswith("CUDA_ERROR"):
            raise LaunchRefused(f"{text} ({name}, grid {tuple(grid)}, block {tuple(block)})")
        found.insert(0, text)
    if found:
        raise EmulationError(f"{name}: " + "\n".join(found))


def _begin_check(
    library: ctypes.CDLL,
    module: Module,
    kernel: Kernel,
    arguments: Sequence[Argument],
    pointers: Any,
) -> None:
    """Names the memory that the kernel may access; the kinds are range_kind of checker.cpp."""
    ranges = [(*argument.extent, 0) for argument in arguments if argument.extent is not None]
    parameters = [*(argument.value for argument in arguments), pointers]
    ranges += [(ctypes.addressof(value), ctypes.sizeof(value), 1) for value in parameters]
    ranges.append((*module.shared_section, 2))
    begins, sizes, kinds = zip(*ranges, strict=True)
    library.emu_check_begin(
        ctypes.c_void_p(kernel.run),
        len(ranges),
        (ctypes.c_void_p * len(ranges))(*begins),
        (ctypes.c_size_t * len(ranges))(*sizes),
        (ctypes.c_int * len(ranges))(*kinds),
    )


def _end_check(library: ctypes.CDLL, path: Path) -> list[str]:
    text = ctypes.create_string_buffer(REPORT_BYTES)
    if not library.emu_check_end(text, REPORT_BYTES):
        return []
    return _with_lines(text.value.decode(), path).splitlines()


def _with_lines(report: str, path: Path) -> str:
    """Replaces offsets in the library, [+0x123], by lines, attention.cu:45."""
    offsets = sorted(set(re.findall(r"\[\+(0x[0-9a-f]+)\]", report)))
    command = ["addr2line", "-a", "-i", "-e", str(path), *offsets]
    output = subprocess.run(command, capture_output=True, text=True).stdout
    # For each offset: itself, then its line, then those of the calls that were inlined around it.
    frames = re.split(r"^0x[0-9a-f]+\n", output, flags=re.MULTILINE)[1:]
    places = {offset: _place(lines.splitlines()) for offset, lines in zip(offsets, frames)}
    return re.sub(r"\[\+(0x[0-9a-f]+)\]", lambda match: places.get(match[1], match[0]), report)


def _place(lines: Sequence[str]) -> str:
    """The innermost line that is not one of our headers."""
    paths = [Path(line.split()[0]) for line in lines]
    return next((path.name for path in paths if path.parent != INCLUDE), paths[0].name)
