"""Compiles CUDA kernels without a GPU: NVRTC from PyPI, called as CuPy calls it.

ptxas reports what each kernel needs; from that and an architecture's limits follow whether it can
be launched and how many warps a multiprocessor holds.

Sources: NVRTC's manual; CUDA C++ Programming Guide, "Technical Specifications per Compute
Capability"; CUDA's occupancy calculator for the granularity of allocations.
"""

import ctypes
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterable
from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from llmsrv.config import default_cache_dir

# What CuPy adds to a RawModule's own options; sm_XX is the current device's.
CUPY_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")
REGISTERS = 65536  # of a multiprocessor, and the most that a block may have
MAX_REGISTERS_OF_A_THREAD = 255
WARP_REGISTERS_UNIT = 256
WARPS_UNIT = 4  # the registers of a block are allocated for a multiple of this many warps


@dataclass(frozen=True)
class Architecture:
    """The limits of a compute capability.

    shared_bytes        shared memory of a multiprocessor
    max_shared_bytes    the most that one block may have
    reserved_bytes      what the system takes of every block's shared memory
    """

    capability: int
    max_warps: int
    max_blocks: int
    shared_bytes: int
    max_shared_bytes: int
    reserved_bytes: int = 1024

    @property
    def has_bfloat16(self) -> bool:
        return self.capability >= 80

    def occupancy(self, registers: int, shared_bytes: int, threads: int) -> float:
        """Share of a multiprocessor's warps that can be resident; 0: a block cannot be launched."""
        warps = -(-threads // 32)
        warp_registers = _round_up(registers * 32, WARP_REGISTERS_UNIT)
        block_registers = warp_registers * _round_up(warps, WARPS_UNIT)
        block_bytes = _round_up(shared_bytes, 128) + self.reserved_bytes
        if shared_bytes > self.max_shared_bytes or registers > MAX_REGISTERS_OF_A_THREAD:
            return 0.0
        blocks = min(
            self.max_blocks,
            self.max_warps // warps,
            REGISTERS // block_registers,
            self.shared_bytes // max(block_bytes, 1),
        )
        return blocks * warps / self.max_warps


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


KIB = 1024
ARCHITECTURES = {
    each.capability: each
    for each in (
        Architecture(75, 32, 16, 64 * KIB, 64 * KIB, reserved_bytes=0),
        Architecture(80, 64, 32, 164 * KIB, 163 * KIB),
        Architecture(86, 48, 16, 100 * KIB, 99 * KIB),
        Architecture(89, 48, 24, 100 * KIB, 99 * KIB),
        Architecture(90, 64, 32, 228 * KIB, 227 * KIB),
        Architecture(100, 64, 32, 228 * KIB, 227 * KIB),
        Architecture(120, 48, 24, 100 * KIB, 99 * KIB),
    )
}


@dataclass(frozen=True)
class Resources:
    """What ptxas says that a kernel needs; bytes are those of a thread, shared_bytes of a block."""

    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int  # stores and loads


class CompileFailure(Exception):
    """The compiler's log."""


def compile_kernels(source: str, options: Iterable[str], capability: int) -> dict[str, Resources]:
    """What each kernel of the source needs on this architecture, by its name.

    options  those that CuPy is given
    Results are cached on disk.
    """
    flags = (*options, *CUPY_OPTIONS, f"-arch=sm_{capability}", "--ptxas-options=-v")
    key = hashlib.sha256("\0".join([version(), source, *flags]).encode()).hexdigest()
    cached = default_cache_dir() / "nvrtc" / f"{key}.json"
    if not cached.exists():
        found = {name: asdict(each) for name, each in _resources(_compiled(source, flags)).items()}
        cached.parent.mkdir(parents=True, exist_ok=True)
        temporary = cached.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(found))
        temporary.replace(cached)
    read = json.loads(cached.read_text())
    return {name: Resources(**fields) for name, fields in read.items()}


def _compiled(source: str, flags: Sequence[str]) -> str:
    """The compiler's log.  Raises CompileFailure."""
    library = _library()
    program = ctypes.c_void_p()
    _check(library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"", 0, None, None))
    try:
        flags = *flags, f"-I{_root() / 'include'}"
        array = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
        failed = library.nvrtcCompileProgram(program, len(flags), array)
        log = _log(library, program)
        if failed:
            raise CompileFailure(log)
        return log
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _log(library: Any, program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    _check(library.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
    log = ctypes.create_string_buffer(size.value)
    _check(library.nvrtcGetProgramLog(program, log))
    return log.value.decode()


def _resources(log: str) -> dict[str, Resources]:
    """ptxas writes a few lines for each kernel, and starts with its name."""
    found: dict[str, Resources] = {}
    for part in log.split("Compiling entry function '")[1:]:
        found[part.partition("'")[0]] = Resources(
            registers=_number(part, r"Used (\d+) registers"),
            shared_bytes=_number(part, r"(\d+) bytes smem"),
            stack_bytes=_number(part, r"(\d+) bytes stack frame"),
            spill_bytes=sum(
                _number(part, rf"(\d+) bytes spill {kind}") for kind in ("stores", "loads")
            ),
        )
    return found


def _number(text: str, pattern: str) -> int:
    match = re.search(pattern, text)
    return int(match[1]) if match else 0


# ---- The library


@cache
def _root() -> Path:
    """Where the wheels nvidia-cuda-nvrtc and nvidia-cuda-runtime of CUDA 13 put their files."""
    package = importlib.util.find_spec("nvidia")
    for folder in (package.submodule_search_locations or []) if package else []:
        if (root := Path(folder) / "cu13").is_dir():
            return root
    raise ModuleNotFoundError("pip install nvidia-cuda-nvrtc nvidia-cuda-runtime")


@cache
def _library() -> Any:
    folder = _root() / "lib"
    # NVRTC opens its built-in functions by name, which works only once they are loaded.
    [builtins] = folder.glob("libnvrtc-builtins.so.*")
    ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
    [path] = folder.glob("libnvrtc.so.*")
    return ctypes.CDLL(str(path))


def _check(result: int) -> None:
    if result:
        text = _library().nvrtcGetErrorString
        text.restype = ctypes.c_char_p
        raise CompileFailure(text(result).decode())


def version() -> str:
    """NVRTC's version, such as 13.5."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return f"{major.value}.{minor.value}"
