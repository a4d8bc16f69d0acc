"""The command line: options from flags and environment, messages, exit codes."""

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
from llmsrv.config import Config
from llmsrv.config import engine_config
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


def test_without_options_the_defaults_hold() -> None:
    assert parse([], {}) == Config()


def test_a_flag_wins_over_the_environment_and_that_over_the_default() -> None:
    environment = {"LLMSRV_PORT": "8001", "LLMSRV_HOST": "0.0.0.0"}
    config = parse(["--port", "8002"], environment)
    assert (config.port, config.host, config.mode) == (8002, "0.0.0.0", "local")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--allow-origins", '["https://a", "https://b"]'],
        ["--allow-origins", "https://a, https://b"],
        ["--allow-origins", "https://a", "--allow-origins", "https://b"],
    ],
)
def test_a_list_is_json_or_commas_or_repeated(arguments: list[str]) -> None:
    assert parse(arguments, {}).allow_origins == ["https://a", "https://b"]
    assert parse([], {"LLMSRV_ALLOW_ORIGINS": "https://a,https://b"}).allow_origins == [
        "https://a",
        "https://b",
    ]


@pytest.mark.parametrize("text, wanted", [("1", True), ("true", True), ("0", False), ("", False)])
def test_a_switch_in_the_environment_is_on_or_off(text: str, wanted: bool) -> None:
    assert parse([], {"LLMSRV_ALLOW_CREDENTIALS": text}).allow_credentials is wanted


def test_overrides_set_options_by_their_names_and_win_over_the_environment() -> None:
    overrides = "max_num_sequence=4; gpu_memory_utilization = 0.5;context_window_size=1024;"
    wanted = Config(
        max_num_sequence=4,
        gpu_memory_utilization=0.5,
        context_window_size=1024,
        overrides=overrides,
    )
    assert parse(["--overrides", overrides], {"LLMSRV_MAX_NUM_SEQUENCE": "9"}) == wanted
    assert parse([], {"LLMSRV_OVERRIDES": overrides}) == wanted


@pytest.mark.parametrize(
    "options",
    [
        ["--speculative-mode", "small_draft"],
        ["--additional-models", "a.gguf"],
        ["--speculative-mode", "small_draft", "--additional-models", "a.gguf,b.gguf"],
    ],
)
def test_a_draft_model_and_its_mode_come_together(options: list[str], tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "tiny.gguf")
    with pytest.raises(StartupError, match="of --additional-models, not"):
        find_models(parse(["--model", str(model), *options], {}))


def test_several_models_are_named_one_by_one_or_in_one_list() -> None:
    given = parse(["--model", "a=x.gguf", "--model", "b=hf:org/y"], {})
    assert given.model == parse([], {"LLMSRV_MODEL": "a=x.gguf,b=hf:org/y"}).model
    assert given.model == ["a=x.gguf", "b=hf:org/y"]


def test_an_engine_gets_the_options_that_concern_it() -> None:
    config = engine_config(parse(["--mode", "server", "--threads", "3"], {}), Path("a.gguf"), None)
    assert (config.model_path, config.mode) == ("a.gguf", "server")
    assert config.backend_options["cpu"]["threads"] == 3


@pytest.mark.parametrize(
    "arguments, environment, named",
    [
        (["--port", "eighty"], {}, "--port"),
        (["--port", "-1"], {}, "--port"),
        (["--port", "65536"], {}, "--port"),
        (["--mode", "fast"], {}, "--mode"),
        (["--allow-origins", "[1]"], {}, "--allow-origins"),
        (["--nonsense"], {}, "--nonsense"),
        (["--gpu-memory-utilization", "1.5"], {}, "--gpu-memory-utilization"),
        (["--overrides", "tensor_parallel_shards=2"], {}, "tensor_parallel_shards=2"),
        (["--overrides", "max_num_sequence"], {}, "--overrides: max_num_sequence"),
        (["--overrides", "max_num_sequence=many"], {}, "--overrides: max_num_sequence"),
        (["--overrides", "port=1"], {}, "got 'port=1'"),
        (["--overrides", "max_num_sequence=1;max_num_sequence=2"], {}, "given twice"),
        (["--overrides", "max_num_sequence=1", "--max-num-sequence", "1"], {}, "given twice"),
        ([], {"LLMSRV_PORT": "eighty"}, "LLMSRV_PORT"),
        ([], {"LLMSRV_BACKEND": "abacus"}, "LLMSRV_BACKEND"),
        ([], {"LLMSRV_ALLOW_CREDENTIALS": "perhaps"}, "LLMSRV_ALLOW_CREDENTIALS"),
    ],
)
def test_a_bad_option_is_named_and_exits_with_2(
    arguments: list[str],
    environment: dict[str, str],
    named: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(arguments, environment)
    assert caught.value.code == 2
    assert named in capsys.readouterr().err


def test_help_and_version_need_nothing_but_the_standard_library() -> None:
    for flag, wanted in (("--help", "LLMSRV_API_KEY"), ("--version", "llmsrv ")):
        ended = subprocess.run(
            [sys.executable, "-S", "llmsrv.py", flag], cwd=ROOT, capture_output=True, text=True
        )
        assert ended.returncode == 0
        assert wanted in ended.stdout


def test_a_missing_package_is_a_sentence_with_the_install_command() -> None:
    ended = subprocess.run(
        [sys.executable, "-S", "llmsrv.py"], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 1
    assert "is not installed; run:" in ended.stderr and "pip install ." in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_port_in_use_is_told_before_any_model_is_loaded(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = run("--port", str(port), "--model", str(tmp_path / "none.gguf"))
    assert ended.returncode == 1
    assert f"port {port} is in use; try --port {port + 1}" in ended.stderr


@pytest.mark.slow
def test_a_file_that_is_no_model_is_refused_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"not a model at all, but long enough to look at")
    ended = run("--port", "0", "--model", str(path))
    assert ended.returncode == 1
    assert "broken.gguf" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("name", slow_but(["no-such-model", "./none.gguf"], "no-such-model"))
def test_a_model_that_is_not_there_is_told_with_what_is(tmp_path: Path, name: str) -> None:
    ended = run("--port", "0", "--model", name, LLMSRV_CACHE_DIR=str(tmp_path))
    assert ended.returncode == 1
    assert name in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_context_beyond_what_the_model_was_made_for_is_refused(tmp_path: Path) -> None:
    model = str(write_tiny_llama(tmp_path / "tiny.gguf", context_length=512))
    ended = run("--port", "0", "--model", model, "--context-window-size", "1000")
    assert ended.returncode == 1
    assert "beyond the 512" in ended.stderr and "--extend-context" in ended.stderr


@pytest.mark.slow
def test_a_context_beyond_what_the_model_was_made_for_may_be_asked_for(tmp_path: Path) -> None:
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


def test_the_ready_lines_say_where_what_and_how_to_try_it_but_no_key(tmp_path: Path) -> None:
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
        # The engine process is there, so the model is being loaded, but the server is not ready.
        eventually(lambda: "loading" in server.output)
        assert server.stop(number) in (0, 130, 143)
        assert "ready at" not in server.output
        assert "Traceback" not in server.output
