"""The command line: help, messages and exit codes."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from llmsrv.api.gate import read_keys
from llmsrv.cli import parse
from llmsrv.errors import StartupError
from llmsrv.registry.find_models import find_models
from tests.support.gguf_writer import write_tiny_llama
from tests.support.parameters import slow_but
from tests.support.server import ROOT
from tests.support.server import eventually
from tests.support.server import run_server


def run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "llmsrv.py", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=30,
    )


@pytest.mark.parametrize(
    "options",
    [
        ["--speculative-mode", "small_draft"],
        ["--additional-models", "a.gguf"],
        ["--speculative-mode", "small_draft", "--additional-models", "a.gguf,b.gguf"],
    ],
)
def test_a_draft_model_needs_its_mode_and_vice_versa(options: list[str], tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "tiny.gguf")
    with pytest.raises(StartupError, match="of --additional-models, not"):
        find_models(parse(["--model", str(model), *options], {}))


def test_help_and_version_need_only_the_standard_library() -> None:
    for flag, wanted in (("--help", "LLMSRV_API_KEY"), ("--version", "llmsrv ")):
        ended = subprocess.run(
            [sys.executable, "-S", "llmsrv.py", flag], cwd=ROOT, capture_output=True, text=True
        )
        assert ended.returncode == 0
        assert wanted in ended.stdout


def test_a_missing_package_is_reported_with_the_install_command() -> None:
    ended = subprocess.run(
        [sys.executable, "-S", "llmsrv.py"], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 1
    assert "is not installed; run:" in ended.stderr and "pip install ." in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_port_in_use_is_reported_before_any_model_is_loaded(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = run("--port", str(port), "--model", str(tmp_path / "none.gguf"))
    assert ended.returncode == 1
    assert f"port {port} is in use; try --port {port + 1}" in ended.stderr


@pytest.mark.slow
def test_a_file_that_is_not_a_model_is_refused_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"not a model at all, but long enough to look at")
    ended = run("--port", "0", "--model", str(path))
    assert ended.returncode == 1
    assert "broken.gguf" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("name", slow_but(["no-such-model", "./none.gguf"], "no-such-model"))
def test_a_missing_model_is_reported_by_its_name(tmp_path: Path, name: str) -> None:
    ended = run("--port", "0", "--model", name, LLMSRV_CACHE_DIR=str(tmp_path))
    assert ended.returncode == 1
    assert name in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_context_beyond_the_model_s_own_is_refused(tmp_path: Path) -> None:
    model = str(write_tiny_llama(tmp_path / "tiny.gguf", context_length=512))
    ended = run("--port", "0", "--model", model, "--context-window-size", "1000")
    assert ended.returncode == 1
    assert "beyond the 512" in ended.stderr and "--extend-context" in ended.stderr


@pytest.mark.slow
def test_a_context_beyond_the_model_s_own_needs_extend_context(tmp_path: Path) -> None:
    model = str(write_tiny_llama(tmp_path / "tiny.gguf", context_length=512))
    options = ("--model", model, "--context-window-size", "1000", "--extend-context")
    with run_server(*options) as server:
        with urllib.request.urlopen(f"{server.url}/v1/models") as response:
            assert json.load(response)["data"][0]["max_model_len"] == 1000


@pytest.mark.parametrize("content", ["", "\n\n", "schlüssel\n"])
def test_a_key_file_that_holds_no_key_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "keys"
    path.write_text(content)
    with pytest.raises(StartupError, match="key"):
        read_keys([], str(path))


@pytest.mark.slow
def test_a_template_that_does_not_compile_is_refused(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "tiny.gguf")
    template = tmp_path / "broken.jinja"
    template.write_text("{% for %}")
    ended = run("--port", "0", "--model", str(model), "--chat-template", str(template))
    assert ended.returncode == 1
    assert "template" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_ready_message_has_url_model_and_a_first_request_but_no_key(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "tiny.gguf")
    keys = tmp_path / "keys"
    keys.write_text("sk-one\r\nsk-two\n\n")
    with run_server("--model", str(model), "--api-key-file", str(keys)) as server:
        assert server.stop() == 0
        ready = server.output
    assert "with tiny on the " in ready and " backend (" in ready
    assert f"curl {server.url}/v1/chat/completions" in ready
    assert '-H "Authorization: Bearer $KEY"' in ready
    assert "sk-one" not in ready


def test_keys_come_from_options_and_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("sk-one\r\nsk-two\n\n")
    assert read_keys(["sk-three"], str(path)) == ["sk-three", "sk-one", "sk-two"]


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_while_the_model_loads_ends_without_a_traceback(
    smollm2: Path, number: signal.Signals
) -> None:
    with run_server("--model", str(smollm2), wait=False) as server:
        # The engine process is running and the model is being loaded.
        eventually(lambda: "loading" in server.output)
        assert server.stop(number) in (0, 130, 143)
        assert "ready at" not in server.output
        assert "Traceback" not in server.output
