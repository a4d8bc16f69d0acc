"""Compiling and caching kernels: the server starts whatever is wrong with compiler or cache."""

import ctypes
import errno
import hashlib
import importlib.util
import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from llmsrv.backend import source
from llmsrv.backend.cpu.backend import CPUBackend
from llmsrv.backend.cpu.backend import CPUOptions
from llmsrv.backend.cpu.tiers import TIERS
from llmsrv.backend.cpu.tiers import Tier
from llmsrv.backend.source import CompileError
from llmsrv.backend.source import find_compiler
from llmsrv.backend.source import kernel_sources
from llmsrv.backend.source import load_library
from llmsrv.config import default_cache_dir
from tests.support.engines import has_exited
from tests.support.parameters import slow_but
from tests.support.server import child_pids
from tests.support.server import eventually

TEXTS = {"answer.c": b"#include \"answer.h\"\nint answer(void) { return ANSWER; }\n"}
FLAGS = ["-O1"]
ROOT = Path(__file__).parents[2]


def texts(answer=42):
    return {**TEXTS, "answer.h": b"#define ANSWER %d\n" % answer}


def answer(cache_dir, **changes):
    return load_library(texts(**changes), FLAGS, cache_dir).answer()


def libraries(cache_dir):
    return sorted((cache_dir / "kernels").glob("*.so"))


@pytest.fixture
def no_compiler(monkeypatch):
    """A function that makes every later start of a compiler fail: only the cache is left."""

    def run(*arguments, **options):
        raise AssertionError("a compiler was started")

    return lambda: monkeypatch.setattr(source.subprocess, "run", run)


def compiler(tmp_path, monkeypatch, script):
    path = tmp_path / "my-cc"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("CC", str(path))


def test_a_library_is_compiled_once(tmp_path, no_compiler):
    assert answer(tmp_path) == 42
    no_compiler()
    assert answer(tmp_path) == 42
    directory = tmp_path / "kernels"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert len(list(directory.iterdir())) == 1  # nothing temporary stays


def test_another_source_flag_or_compiler_makes_another_library(tmp_path, monkeypatch):
    assert answer(tmp_path) == 42 and answer(tmp_path, answer=43) == 43
    load_library(texts(), ["-O0"], tmp_path)
    compiler(tmp_path, monkeypatch, 'exec cc "$@"')
    assert answer(tmp_path) == 42
    monkeypatch.setattr(source, "cpu_features", lambda: frozenset({"another"}))
    assert answer(tmp_path) == 42
    assert len(libraries(tmp_path)) == 5


@pytest.mark.parametrize("damage", slow_but(["truncated", "altered", "empty"], "altered"))
def test_a_damaged_library_is_compiled_again(tmp_path, caplog, damage):
    # Not loaded here before it is damaged: the loader would find the one in memory.
    command = [sys.executable, "-c", _LOAD, str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT)
    [library] = libraries(tmp_path)
    content = library.read_bytes()
    altered = content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]
    library.write_bytes({"truncated": content[:999], "altered": altered, "empty": b""}[damage])
    with caplog.at_level(logging.WARNING):
        assert answer(tmp_path) == 42
    assert "is damaged" in caplog.text
    assert [path.read_bytes() for path in libraries(tmp_path)] == [content]


_LOAD = f"""
import sys
from pathlib import Path
from llmsrv.backend.source import load_library
assert load_library({texts()}, {FLAGS}, Path(sys.argv[1])).answer() == 42
"""


def test_two_processes_at_once_both_get_a_library(tmp_path):
    command = [sys.executable, "-c", _LOAD, str(tmp_path)]
    processes = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert len(libraries(tmp_path)) == 1


def test_a_directory_that_others_can_write_to_is_not_used(tmp_path, caplog):
    directory = tmp_path / "kernels"
    directory.mkdir()
    directory.chmod(0o777)
    with caplog.at_level(logging.WARNING):
        assert answer(tmp_path) == 42
    assert "others can write to it" in caplog.text
    assert not libraries(tmp_path)


def test_a_directory_of_another_user_is_not_used(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(source.os, "getuid", lambda: os.geteuid() + 1)
    with caplog.at_level(logging.WARNING):
        assert answer(tmp_path) == 42
    assert "belongs to user" in caplog.text
    assert not libraries(tmp_path)


def test_a_link_in_place_of_the_directory_is_not_followed(tmp_path, caplog):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "kernels").symlink_to(elsewhere)
    with caplog.at_level(logging.WARNING):
        assert answer(tmp_path) == 42
    assert "is not a directory" in caplog.text
    assert not list(elsewhere.iterdir())


def test_a_cache_that_cannot_be_made_costs_only_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("no directory")
    with caplog.at_level(logging.WARNING):
        assert answer(tmp_path / "file") == 42
    [record] = caplog.records
    assert "each start compiles them" in record.message


@pytest.mark.parametrize(
    "module, name, error",
    [
        ("tempfile", "mkstemp", OSError(errno.EROFS, "Read-only file system")),
        ("os", "replace", OSError(errno.ENOSPC, "No space left on device")),
    ],
)
def test_a_cache_that_cannot_be_written_costs_only_a_warning(
    tmp_path, caplog, monkeypatch, module, name, error
):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(getattr(source, module), name, fail)
    with caplog.at_level(logging.WARNING):
        assert answer(tmp_path) == 42
    [record] = caplog.records
    assert error.strerror in record.message and "each start compiles them" in record.message
    assert not list((tmp_path / "kernels").iterdir())


def test_an_intact_library_that_cannot_be_loaded_is_compiled_again(tmp_path, caplog):
    assert answer(tmp_path) == 42
    [library] = libraries(tmp_path)
    library.unlink()
    nonsense = b"compiled for another system"
    name = f"{library.name.partition('-')[0]}-{hashlib.sha256(nonsense).hexdigest()}.so"
    library.with_name(name).write_bytes(nonsense)
    with caplog.at_level(logging.WARNING):
        assert answer(tmp_path) == 42
    assert "cannot be loaded" in caplog.text


@pytest.mark.parametrize(
    "script, message",
    [
        ("echo 'answer.c:1: error: out of luck' >&2; exit 1", "answer.c:1: error: out of luck"),
        ("kill -9 $$", "failed with -9"),
        ("exit 0", "cannot be compiled or loaded"),
        ("echo nonsense > kernels.so", "cannot be compiled or loaded"),
    ],
)
def test_the_error_has_the_message_of_a_failing_compiler(tmp_path, monkeypatch, script, message):
    compiler(tmp_path, monkeypatch, script)
    with pytest.raises(CompileError, match=message):
        answer(tmp_path)


def test_a_compiler_that_hangs_is_stopped(tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch, "exec sleep 60")
    monkeypatch.setattr(source, "COMPILE_TIMEOUT_S", 0.1)
    with pytest.raises(CompileError, match="was stopped after"):
        answer(tmp_path)


@pytest.mark.slow
def test_123_nothing_is_left_of_a_build_whose_process_is_killed(tmp_path, monkeypatch):
    # As gcc does, this compiler starts another process, which writes to a temporary file.
    record = 'echo "$$ $PWD" > "$RECORD.$$"; echo > "$TMPDIR/temporary"; sleep 60 & wait'
    compiler(tmp_path, monkeypatch, record)
    monkeypatch.setenv("RECORD", str(tmp_path / "record"))
    builder = subprocess.Popen([sys.executable, "-c", _LOAD, str(tmp_path)], cwd=ROOT)
    eventually(lambda: [file for file in tmp_path.glob("record.*") if file.read_text()])
    [file] = tmp_path.glob("record.*")
    pid, folder = file.read_text().split()
    assert Path(folder).is_dir()
    children = child_pids(int(pid))
    builder.kill()
    builder.wait()
    assert all(has_exited(process, 5) for process in (int(pid), *children))
    eventually(lambda: not Path(folder).exists())


def test_the_stub_on_macos_without_tools_is_not_a_compiler(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(source.sys, "platform", "darwin")
    monkeypatch.setattr(source.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(source.importlib.util, "find_spec", lambda name: None)
    xcode_select = subprocess.CompletedProcess(["xcode-select", "-p"], 2)
    monkeypatch.setattr(source.subprocess, "run", lambda *arguments, **options: xcode_select)
    with pytest.raises(CompileError, match="no C compiler was found"):
        find_compiler()


def test_a_tier_that_the_compiler_does_not_know_gives_way_to_the_next(caplog):
    tiers = Tier("newest", frozenset(), ("-mno-such-instructions",)), *TIERS
    backend = CPUBackend(CPUOptions(default_cache_dir(), tiers=tiers))
    assert backend.tier in TIERS
    [record] = caplog.records
    assert "-mno-such-instructions" in record.message
    assert "trying the next slower ones" in record.message


def test_after_a_compiler_that_hangs_no_other_tier_is_tried(tmp_path, monkeypatch, caplog):
    compiler(tmp_path, monkeypatch, "exec sleep 60")
    monkeypatch.setattr(source, "COMPILE_TIMEOUT_S", 0.1)
    with pytest.raises(CompileError, match="was stopped after"):
        CPUBackend(CPUOptions(tmp_path))
    assert not caplog.records


def test_the_compiler_is_cc_of_the_environment_then_of_the_path_then_ziglang(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("CC", "cc -march=armv9")
    assert find_compiler().command == ("cc", "-march=armv9")
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(CompileError, match="no-such-compiler.*pip install"):
        find_compiler()
    monkeypatch.delenv("CC")
    assert find_compiler().command[0].endswith("/cc")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(source.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CompileError, match="no C compiler was found.*pip install"):
        find_compiler()
    spec = type("Spec", (), {"origin": __file__})
    monkeypatch.setattr(source.importlib.util, "find_spec", lambda name: spec)
    assert find_compiler().command == (sys.executable, "-m", "ziglang", "cc")


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("ziglang"), reason="needs ziglang")
def test_ziglang_compiles_the_best_tier_where_nothing_else_can(tmp_path, monkeypatch):
    best = CPUBackend(CPUOptions(default_cache_dir())).tier
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "ziglang" in find_compiler().command
    assert CPUBackend(CPUOptions(tmp_path)).tier == best
    assert load_library(texts(), [*FLAGS, "-march=native"], tmp_path).answer() == 42


def test_apples_own_cpus_have_dot_products(monkeypatch):
    def read_text(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(source.Path, "read_text", read_text)
    monkeypatch.setattr(source.platform, "machine", lambda: "arm64")
    tiers = [tier.name for tier in TIERS if tier.needs <= source.cpu_features()]
    assert tiers == ["NEON", "portable"]


def test_the_kernels_of_this_checkout_are_found():
    names = kernel_sources("cpu")
    assert "plan.c" in names and "simd.h" in names and "README.md" not in names


def test_a_library_stays_usable_when_its_build_directory_is_gone(tmp_path):
    (tmp_path / "file").write_text("no cache")
    library = load_library(texts(), FLAGS, tmp_path / "file")
    library.answer.restype = ctypes.c_int
    assert library.answer() == 42
