"""A pytest plugin: runs the CPU kernels of AArch64 under qemu-aarch64.

Loaded by cpu/test_aarch64.py as `-p tests.support.aarch64`; TIER names the tier.  ziglang compiles
each file once, into the directory OBJECTS.  The emulated process maps the arena of this process at
the same address, so pointers are valid in both.
"""

import functools
import hashlib
import os
import struct
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llmsrv.backend import source
from llmsrv.backend.cpu import backend
from llmsrv.backend.cpu import library as cpu_library
from llmsrv.backend.cpu.tiers import TIERS
from tests.support.arena import ADDRESS
from tests.support.arena import Arena
from tests.support.arena import SIZE

HOST = Path(__file__).with_name("aarch64_host.c")
ZIG = (sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-musl")
# Tier -> zig's flags for the CPU, and a CPU of qemu with no more features.
CPUS = {
    "NEON": ("-mcpu=generic+v8_2a+dotprod", "neoverse-n1"),
    "NEON with I8MM": ("-mcpu=generic+v8_2a+dotprod+i8mm", "max"),
}


class Emulated:
    """The functions of one library, in a process of its own.

    directory  a temporary directory with the program, kept while it runs
    """

    def __init__(self, directory: Any, program: Path, qemu_cpu: str, arena: Arena) -> None:
        self._directory = directory
        command = ["qemu-aarch64", "-cpu", qemu_cpu, str(program)]
        self._process = subprocess.Popen(
            [*command, str(ADDRESS), str(SIZE), str(arena.fd)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[arena.fd],
        )

    def call(self, number: int, *arguments: int) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        words = *arguments, *[0] * (16 - len(arguments))
        self._process.stdin.write(struct.pack("17q", number, *words))
        self._process.stdin.flush()
        return int.from_bytes(self._process.stdout.read(8), "little", signed=True)


def pytest_load_initial_conftests() -> None:  # before conftest asks for the CPU's features
    install(os.environ["TIER"])


def install(name: str) -> None:
    tier = next(tier for tier in TIERS if tier.name == name)
    arena = Arena()
    for module in (backend, source):
        setattr(module, "cpu_features", lambda: tier.needs)
    setattr(backend, "load_library", functools.partial(load, arena, name))
    arena.install()


def load(
    arena: Arena, tier: str, texts: dict[str, bytes], flags: tuple[str, ...], *_: object
) -> Any:
    names = list(cpu_library.FUNCTIONS)
    directory = tempfile.TemporaryDirectory()
    program = compile_for(tier, texts, flags, Path(directory.name))
    emulated = Emulated(directory, program, CPUS[tier][1], arena)
    return arena.library(
        {name: functools.partial(emulated.call, i) for i, name in enumerate(names)}
    )


def compile_for(tier: str, texts: dict[str, bytes], flags: tuple[str, ...], build: Path) -> Path:
    """Compiles the kernels and HOST to a program; the C library is for any AArch64, built once."""
    for name, text in texts.items():
        (build / name).write_bytes(text)
    functions = "".join(f"F({name})" for name in cpu_library.FUNCTIONS)
    (build / "host.c").write_text(f"#define FUNCTIONS {functions}\n{HOST.read_text()}")
    names = [name for name in texts if name.endswith(".c")]
    without_march = [flag for flag in flags if not flag.startswith("-march=")]
    compiler = (*ZIG, *without_march, CPUS[tier][0])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(functools.partial(object_of, compiler, build), names))
    command = [*ZIG, "-O1", "-static", "-Wno-everything", "host.c", *objects, "-o", "kernels"]
    subprocess.run(command, cwd=build, check=True)
    return build / "kernels"


def object_of(compiler: tuple[str, ...], build: Path, name: str) -> str:
    """Compiles one file unless OBJECTS has it: most do not depend on the numbers of bits."""
    preprocess = [*compiler, "-E", "-P", name]
    text = subprocess.run(preprocess, cwd=build, check=True, stdout=subprocess.PIPE).stdout
    options = [word for word in compiler if not word.startswith("-D")]
    key = hashlib.sha256("\0".join([*options, name, ""]).encode() + text).hexdigest()
    path = Path(os.environ["OBJECTS"], f"{key}.o")
    if not path.exists():
        subprocess.run([*compiler, "-c", name, "-o", str(path)], cwd=build, check=True)
    return str(path)
