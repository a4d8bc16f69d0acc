"""Finds the kernels' sources and a compiler, compiles them, and caches the library.

A cached library is named KEY-SHA256.so.  KEY is a hash of everything that decides the result:
sources, flags, compiler and CPU.  SHA256 is the hash of the library itself, so the name both finds
a library and proves that it is intact.  The cache directory is writable for its owner only.  A
library enters it by a single rename, and its hash is checked before it is loaded; a damaged one is
compiled again.  Two processes that compile at the same time produce the same file twice.
Knows nothing of what the kernels do.
"""

import ctypes
import hashlib
import importlib.resources
import importlib.util
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path

from llmsrv.backend.base import CannotRun
from llmsrv.backend.build_folder import build_folder

log = logging.getLogger("llmsrv.backend")

COMPILERS = ("cc", "gcc", "clang")
COMPILE_TIMEOUT_S = 50.0  # less than the supervisor waits for a heartbeat while loading
OTHERS = "others_together.c"
INSTALL = "install a C compiler, or run: pip install 'llmsrv[cc]'"


class CompileError(CannotRun):
    """There is no compiler, or it failed."""


class CompilerHangs(CompileError):
    """The compiler took too long and was stopped; another attempt would take as long."""


@dataclass(frozen=True)
class Compiler:
    """command: runs it; identity: changes when another version is installed in its place."""

    command: tuple[str, ...]
    identity: str


def find_compiler() -> Compiler:
    """$CC, else the first of cc, gcc and clang, else the one in the package ziglang."""
    if configured := os.environ.get("CC"):
        command = shlex.split(configured)
        path = shutil.which(command[0]) if command else None
        if path is None:
            raise CompileError(f"CC is '{configured}', but no such program was found; {INSTALL}")
        return _compiler(Path(path), command)
    for name in COMPILERS:
        if (path := shutil.which(name)) and not _is_xcode_stub(path):
            return _compiler(Path(path), [path])
    if spec := importlib.util.find_spec("ziglang"):
        assert spec.origin is not None
        return _compiler(Path(spec.origin), [sys.executable, "-m", "ziglang", "cc"])
    raise CompileError(f"no C compiler was found ($CC, {', '.join(COMPILERS)}); {INSTALL}")


def kernel_sources(folder: str) -> dict[str, bytes]:
    """The source files in one folder of kernels/: name -> content."""
    directory = _kernels() / folder
    return {
        entry.name: entry.read_bytes()
        for entry in sorted(directory.iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith((".c", ".h", ".cu", ".cuh"))
    }


def load_library(
    sources: dict[str, bytes], flags: Iterable[str], cache_dir: Path, slow: Iterable[str] = ()
) -> ctypes.CDLL:
    """All .c files of `sources` as one shared library, from the cache or compiled now.

    slow       files that take long to compile; all others are compiled as one, because reading
               headers takes most of their time, so their static names must differ
    cache_dir  the libraries are in its folder `kernels`; if it cannot be used, the library is
               compiled for this process only, with a warning
    Raises CompileError.
    """
    compiler = find_compiler()
    key = _key(sources, tuple(flags), compiler)
    directory = private_directory(cache_dir / "kernels")
    if directory is not None and (cached := _cached(directory, key)):
        try:
            return ctypes.CDLL(str(cached))
        except OSError as error:
            log.warning("the cached kernels %s cannot be loaded: %s", cached, error)
    log.info("compiling the kernels with %s", shlex.join(compiler.command))
    try:
        with build_folder() as (build, group):
            library = _compile(compiler, sources, tuple(flags), tuple(slow), build, group)
            kept = directory and _keep(library, directory, key)
            return ctypes.CDLL(str(kept or library))
    except OSError as error:
        raise CompileError(f"the kernels cannot be compiled or loaded: {error}") from error


def private_directory(directory: Path) -> Path | None:
    """The directory, made private to this user; None, after a warning, if that fails."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.lstat()
        if not stat.S_ISDIR(status.st_mode):
            raise OSError("it is not a directory")
        if status.st_uid != os.getuid():
            raise OSError(f"it belongs to user {status.st_uid}")
        if status.st_mode & 0o022:
            raise OSError("others can write to it")
        return directory
    except OSError as error:
        log.warning("kernels are not cached in %s: %s; each start compiles them", directory, error)
        return None


def cpu_features() -> frozenset[str]:
    """The instruction sets of this CPU, by their names in Linux's /proc/cpuinfo.  Elsewhere, the
    CPU's name; on Apple's own CPUs also the dot products, which all of them have."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        features = {platform.machine(), platform.processor()}
        return frozenset(features | {"asimddp"} if "arm64" in features else features)
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


# ---- Compiler, cache and files


def _compiler(path: Path, command: list[str]) -> Compiler:
    real = path.resolve()
    status = real.stat()
    return Compiler(tuple(command), f"{shlex.join(command)} {real} {status.st_size} "
                    f"{status.st_mtime_ns}")


def _is_xcode_stub(path: str) -> bool:
    """On macOS without Xcode's tools, /usr/bin/cc only opens a window that offers them."""
    if sys.platform != "darwin" or not path.startswith("/usr/bin/"):
        return False
    return subprocess.run(["xcode-select", "-p"], capture_output=True).returncode != 0


def _kernels() -> Traversable:
    package = importlib.resources.files("llmsrv")
    installed = package / "kernels"
    return installed if installed.is_dir() else Path(str(package)).parent / "kernels"


def _key(sources: dict[str, bytes], flags: tuple[str, ...], compiler: Compiler) -> str:
    facts = [*flags, compiler.identity, platform.machine(), *sorted(cpu_features())]
    digest = hashlib.sha256("\0".join(facts).encode())
    for name, text in sorted(sources.items()):
        digest.update(b"\0%s\0%d\0" % (name.encode(), len(text)))
        digest.update(text)
    return digest.hexdigest()[:32]


def _cached(directory: Path, key: str) -> Path | None:
    """An intact library with this key; damaged ones are deleted."""
    for path in directory.glob(f"{key}-*.so"):
        try:
            if path.name == _name(key, path.read_bytes()):
                return path
        except OSError as error:
            log.warning("%s cannot be read: %s", path, error)
            continue
        log.warning("%s is damaged; it is compiled again", path)
        path.unlink(missing_ok=True)
    return None


def _name(key: str, content: bytes) -> str:
    return f"{key}-{hashlib.sha256(content).hexdigest()}.so"


def _compile(
    compiler: Compiler,
    sources: dict[str, bytes],
    flags: tuple[str, ...],
    slow: tuple[str, ...],
    build: Path,
    group: int,
) -> Path:
    """Compiles the slow files and all others together in parallel, and links them.

    build, group  as in build_folder()
    """
    for name, text in sources.items():
        (build / name).write_bytes(text)
    others = [name for name in sources if name.endswith(".c") and name not in slow]
    (build / OTHERS).write_text("".join(f'#include "{name}"\n' for name in others))
    if "ziglang" in compiler.command:  # targets this CPU anyway, and names others differently
        flags = tuple(flag for flag in flags if not flag.startswith("-march="))
    command = *compiler.command, *flags, "-fPIC"
    names = *slow, OTHERS
    deadline_s = time.monotonic() + COMPILE_TIMEOUT_S
    objects = [f"{name}.o" for name in names]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        compiling = [
            threads.submit(_run, (*command, "-c", "-o", output, name), build, group, deadline_s)
            for name, output in zip(names, objects, strict=True)
        ]
    for each in compiling:
        each.result()
    library = build / "kernels.so"
    _run((*command, "-shared", "-o", library.name, *objects, "-lm"), build, group, deadline_s)
    return library


def _run(command: tuple[str, ...], build: Path, group: int, deadline_s: float) -> None:
    try:
        done = subprocess.run(
            command,
            cwd=build,
            env=os.environ | {"TMPDIR": str(build)},
            capture_output=True,
            text=True,
            timeout=max(0.0, deadline_s - time.monotonic()),
            process_group=group,
        )
    except subprocess.TimeoutExpired:
        message = f"{command[0]} did not finish and was stopped after {COMPILE_TIMEOUT_S:.0f} s"
        raise CompilerHangs(message) from None
    if done.returncode:
        log.debug("%s\n%s", shlex.join(command), done.stderr)
        message = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
        raise CompileError(f"{command[0]} failed with {done.returncode}: {message}")


def _keep(library: Path, directory: Path, key: str) -> Path | None:
    """Copies the library into the cache; None, after a warning, if that fails."""
    try:
        content = library.read_bytes()
        descriptor, temporary = tempfile.mkstemp(dir=directory)
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
            kept = directory / _name(key, content)
            os.replace(temporary, kept)
            return kept
        except OSError:
            os.unlink(temporary)
            raise
    except OSError as error:
        log.warning("kernels are not cached in %s: %s; each start compiles them", directory, error)
        return None
