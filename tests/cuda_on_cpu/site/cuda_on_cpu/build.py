"""Compiles the emulator and kernels with g++, once each; shared libraries are cached on disk."""

import contextlib
import ctypes
import hashlib
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cuda_on_cpu.options import EmulationError
from cuda_on_cpu.options import capability
from cuda_on_cpu.options import options
from cuda_on_cpu.translate import CHECKED_STORAGE
from cuda_on_cpu.translate import ONE_WORKER_STORAGE
from cuda_on_cpu.translate import THREAD_STORAGE
from cuda_on_cpu.translate import translate

SHIM = Path(__file__).parents[2] / "shim"
INCLUDE = SHIM / "include"
HEADERS = (SHIM / "emulator.h", *sorted(INCLUDE.glob("*.h")))
COMMON = ("-std=c++17", "-fPIC", "-g1", "-gdwarf-4", "-mavx2", "-mfma", "-mf16c")
RUNTIME_FLAGS = (*COMMON, "-O2", "-shared", "-lpthread", "-ldl")
KERNEL_FLAGS = (
    *COMMON,
    "-O1",
    "-w",  # g++ knows fewer pragmas and attributes than nvcc
    "-fno-strict-aliasing",
    "-fno-math-errno",
    "-ffp-contract=fast",  # as nvcc's default -fmad=true; -O1 alone contracts nothing
    "-fexpensive-optimizations",
)
MAX_AGE_S = 14 * 24 * 3600  # of a cached library: every change of a kernel leaves one behind
CHECKED_FLAGS = ("-fsanitize=thread,alignment", "--param=tsan-instrument-func-entry-exit=0")


class Kernel(ctypes.Structure):
    """emu_kernel of emulator.h"""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("run", ctypes.c_void_p),
        ("num_arguments", ctypes.c_int),
        ("sizes", ctypes.POINTER(ctypes.c_int)),
        ("kinds", ctypes.c_char_p),
        ("max_threads", ctypes.c_int),
    ]


@dataclass
class Module:
    """A compiled kernel file.

    kernels         name -> entry of the table in the library
    shared_section  address and number of bytes of the static shared memory in a checked module
    """

    path: Path
    library: ctypes.CDLL
    kernels: dict[str, Kernel]
    shared_section: tuple[int, int]


class CompileError(Exception):
    """g++ does not compile the kernel; the message is its output."""


@cache
def runtime() -> ctypes.CDLL:
    sources = sorted(SHIM.glob("*.cpp"))
    texts = [path.read_bytes() for path in (*sources, *sorted(SHIM.glob("*.h")))]
    path = _cached("libemulator", RUNTIME_FLAGS, *texts)
    if not path.exists():
        # As one file: most of the time goes into C++'s headers.
        unit = "".join(f'#include "{source}"\n' for source in sources)
        _build(["-x", "c++", "-", *RUNTIME_FLAGS], path, unit)
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def driver_library() -> Path:
    """Our libcuda.so.1, in a directory of its own."""
    source = SHIM.parent / "driver" / "libcuda.c"
    flags = ("-x", "c", "-O1", "-fPIC", "-shared", "-Wl,-soname,libcuda.so.1")
    directory = _cached("driver", flags, source.read_bytes()).with_suffix("")
    directory.mkdir(exist_ok=True)
    path = directory / "libcuda.so.1"
    if not path.exists():
        _build([*flags, str(source)], path)
    return path


def compile_kernels(code: str, macros: tuple[str, ...]) -> Module:
    """Compiles for the current device and options.

    macros  -DNAME=VALUE
    Raises CompileError.
    """
    flags = *KERNEL_FLAGS, *macros, f"-D__CUDA_ARCH__={capability() * 10}"
    if options.is_checked:
        return _compile(code, (*flags, *CHECKED_FLAGS), CHECKED_STORAGE)
    storage = ONE_WORKER_STORAGE if options.workers == 1 else THREAD_STORAGE
    return _compile(code, flags, storage)


@cache
def _compile(code: str, flags: tuple[str, ...], storage: str) -> Module:
    runtime()
    text = f'#include "cuda_emulation.h"\n#line 1 "kernel.cu"\n{code}'
    path = _cached("kernel", flags, text.encode(), storage.encode(), *_translation())
    if not path.exists():
        preprocess = [*_gxx(), *flags, f"-I{INCLUDE}", "-E", "-x", "c++", "-"]
        translated = translate(_run(preprocess, text), storage)
        source = path.with_suffix(f".{os.getpid()}.cpp")
        source.write_text(translated)
        try:
            _build([*flags, "-shared", "-nostdlib", "-fpreprocessed", str(source)], path)
        finally:
            source.unlink()
    return _load(path)


@cache
def _translation() -> tuple[bytes, ...]:
    """All that decides how kernels are translated."""
    translation = Path(__file__).with_name("translate.py")
    return tuple(path.read_bytes() for path in (*HEADERS, translation))


def _load(path: Path) -> Module:
    library = ctypes.CDLL(str(path))
    count = ctypes.c_int.in_dll(library, "emu_num_kernels").value
    table = (Kernel * count).in_dll(library, "emu_kernels")
    begin, end = (ctypes.c_size_t * 2).in_dll(library, "emu_shared_section")
    kernels = {kernel.name.decode(): kernel for kernel in table}
    return Module(path, library, kernels, (begin, end - begin))


def _build(arguments: list[str], path: Path, text: str | None = None) -> None:
    """Writes the library at once, since processes build the same one at the same time."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    _run([*_gxx(), *arguments, "-o", str(temporary)], text)
    temporary.replace(path)
    for other in cache_directory().glob("*.so"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - other.stat().st_mtime > MAX_AGE_S:
                other.unlink()


def _run(command: list[str], text: str | None = None) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise CompileError(done.stderr[:6000])
    return done.stdout


@cache
def _gxx() -> tuple[str, ...]:
    path = shutil.which("g++")
    if path is None:
        raise EmulationError("emulating CUDA needs g++")
    return (path,)


def _cached(stem: str, flags: tuple[str, ...], *texts: bytes) -> Path:
    digest = hashlib.sha256()
    compiler = Path(_gxx()[0]).resolve()
    for part in (str(compiler).encode(), repr(flags).encode(), *texts):
        digest.update(b"%d " % len(part) + part)
    directory = cache_directory()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory / f"{stem}-{digest.hexdigest()[:24]}.so"


def cache_directory() -> Path:
    given = os.environ.get("CUDA_ON_CPU_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "cuda-on-cpu"
