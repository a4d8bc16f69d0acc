"""The commands pull, models and rm."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmsrv.cli import parse_command
from llmsrv.config import default_cache_dir
from llmsrv.files.source import DEFAULT_DOWNLOAD
from tests.support.fake_hub import FakeHub
from tests.support.fake_hub import fake_hub
from tests.support.gguf_writer import write_tiny_llama
from tests.support.parameters import slow_but
from tests.support.server import ROOT
from tests.support.server import run_server


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    model = write_tiny_llama(tmp_path / "tiny.gguf").read_bytes()
    with fake_hub({"org/tiny": {"m.gguf": model}}) as running:
        yield running


def run(
    cache: Path, *arguments: str, hub: FakeHub | None = None
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "llmsrv.py", *arguments],
        cwd=ROOT,
        env=os.environ | environment(cache, hub),
        capture_output=True,
        text=True,
        timeout=60,
    )


def environment(cache: Path, hub: FakeHub | None) -> dict[str, str]:
    where = {"HF_ENDPOINT": hub.url} if hub else {"HF_HUB_OFFLINE": "1"}
    return {"LLMSRV_CACHE_DIR": str(cache), "HF_HOME": str(cache / "home"), **where}


def cached_file(cache: Path, name: str, size_bytes: int) -> Path:
    path = cache / "models" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.truncate(path, size_bytes)
    return path


def test_help_names_the_commands() -> None:
    ended = subprocess.run(
        [sys.executable, "-S", "llmsrv.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    for command in ("pull NAME", "models", "rm NAME"):
        assert f"\n  {command}  " in ended.stdout


@pytest.mark.parametrize("command", ["pull", "models", "rm"])
def test_the_help_of_a_command_needs_only_the_standard_library(command: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-S", "llmsrv.py", command, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0
    assert f"usage: llmsrv {command}" in ended.stdout and "--cache-dir DIR" in ended.stdout
    assert ("--hf-token" in ended.stdout) == (command == "pull")
    assert "--port" not in ended.stdout


@pytest.mark.parametrize(
    "arguments", [["pull"], ["rm"], ["rm", "a", "b"], ["models", "a"], ["pull", "a", "--port", "1"]]
)
def test_bad_usage_of_a_command_exits_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_command(arguments[0], arguments[1:], {})
    assert caught.value.code == 2


def test_a_commands_options_come_from_flags_then_the_environment_then_defaults() -> None:
    environment = {"LLMSRV_CACHE_DIR": "/one", "LLMSRV_MODEL": "other", "LLMSRV_HF_TOKEN": "t"}
    config = parse_command("pull", ["name"], environment)
    assert (config.model, config.cache_dir, config.hf_token) == (["name"], Path("/one"), "t")
    flagged = parse_command("rm", ["name", "--cache-dir", "/two"], environment)
    assert flagged.cache_dir == Path("/two")
    assert parse_command("models", [], {}).cache_dir == default_cache_dir()


def test_an_empty_cache_is_reported_on_stderr(tmp_path: Path) -> None:
    ended = run(tmp_path, "models")
    assert (ended.returncode, ended.stdout) == (0, "")
    assert ended.stderr == f"no models in {tmp_path}\n"


def test_models_are_listed_with_name_size_and_path(tmp_path: Path) -> None:
    default = cached_file(tmp_path, DEFAULT_DOWNLOAD.file_name, 98_362_432)
    mine = cached_file(tmp_path, "my model.gguf", 12_345_678_901)
    cached_file(tmp_path, ".part", 100)
    lines = run(tmp_path, "models").stdout.splitlines()
    assert lines == [
        f"{DEFAULT_DOWNLOAD.name}       98 MB  {default}",
        f"my model                12,346 MB  {mine}",
    ]


@pytest.mark.slow
def test_a_model_from_the_hub_is_pulled_listed_served_and_removed(
    hub: FakeHub, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    pulled = run(cache, "pull", "hf:org/tiny", hub=hub)
    assert pulled.returncode == 0, pulled.stderr
    path = Path(pulled.stdout.strip())
    assert path.is_file()
    assert run(cache, "models").stdout == f"hf:org/tiny        0 MB  {path.parent}\n"
    options = ("--model", "hf:org/tiny", "--backend", "reference")
    with run_server(*options, environment=environment(cache, None)) as server:
        assert " with tiny on the " in server.output
        assert server.stop() == 0
    removed = run(cache, "rm", "hf:org/tiny")
    assert (removed.returncode, removed.stdout) == (0, "removed hf:org/tiny, 0 MB\n")
    assert not path.exists()
    again = run(cache, "rm", "hf:org/tiny")
    assert again.returncode == 1
    assert again.stderr == f"llmsrv: no model 'hf:org/tiny' in the cache {cache}; there are: none\n"


@pytest.mark.slow
def test_a_model_from_the_hub_that_is_not_cached_is_fetched_when_served(
    hub: FakeHub, tmp_path: Path
) -> None:
    options = ("--model", "hf:org/tiny:m", "--served-model-name", "it", "--backend", "reference")
    with run_server(*options, environment=environment(tmp_path / "cache", hub)) as server:
        assert "fetching hf:org/tiny:m (0 MB, once)" in server.output
        assert " with it on the " in server.output


def test_pull_accepts_paths_and_cached_names(tmp_path: Path) -> None:
    path = cached_file(tmp_path, "mine.gguf", 1000)
    for name in ("mine", str(path)):
        ended = run(tmp_path, "pull", name)
        assert (ended.returncode, ended.stdout) == (0, f"{path}\n")


@pytest.mark.parametrize(
    "name",
    slow_but(["..", "../models/mine.gguf", "mine.gguf", "/", "", ".", "hf"], "..", "mine.gguf"),
)
def test_rm_removes_only_models_of_the_cache(tmp_path: Path, name: str) -> None:
    path = cached_file(tmp_path, "mine.gguf", 1000)
    ended = run(tmp_path, "rm", name)
    assert ended.returncode == 1
    assert "; there are: mine" in ended.stderr
    assert path.exists()


def test_rm_removes_a_file_by_its_name(tmp_path: Path) -> None:
    path = cached_file(tmp_path, "mine.gguf", 5_000_000)
    other = cached_file(tmp_path, "other.gguf", 1)
    assert run(tmp_path, "rm", "mine").stdout == "removed mine, 5 MB\n"
    assert not path.exists() and other.exists()


def test_a_model_that_cannot_be_removed_is_an_error_without_a_traceback(tmp_path: Path) -> None:
    path = cached_file(tmp_path, "mine.gguf", 1)
    path.unlink()
    path.mkdir()
    path.with_name("elsewhere").mkdir()
    path.rmdir()
    path.symlink_to("elsewhere", target_is_directory=True)
    ended = run(tmp_path, "rm", "mine")
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
