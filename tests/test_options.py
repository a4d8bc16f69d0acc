"""Options: from flags, from the environment, and from the environment alone."""

from pathlib import Path

import pytest

from llmsrv.app import build
from llmsrv.cli import parse
from llmsrv.config import Config
from llmsrv.config import engine_config
from llmsrv.errors import StartupError
from llmsrv.options import config_from_environment


def test_without_options_the_defaults_hold() -> None:
    assert parse([], {}) == Config()


def test_flags_win_over_the_environment_and_that_wins_over_defaults() -> None:
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
def test_a_list_is_json_or_separated_by_commas_or_a_repeated_flag(arguments: list[str]) -> None:
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


def test_several_models_are_given_one_by_one_or_in_one_list() -> None:
    given = parse(["--model", "a=x.gguf", "--model", "b=hf:org/y"], {})
    assert given.model == parse([], {"LLMSRV_MODEL": "a=x.gguf,b=hf:org/y"}).model
    assert given.model == ["a=x.gguf", "b=hf:org/y"]


def test_an_engine_gets_the_options_that_it_needs() -> None:
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


def test_without_variables_the_defaults_hold() -> None:
    assert config_from_environment({"PATH": "/bin", "LLMSRV_NO_SUCH_OPTION": "1"}) == Config()


def test_variables_of_every_type_are_read() -> None:
    environment = {
        "LLMSRV_MODEL": "a=x.gguf,b=y.gguf",
        "LLMSRV_THREADS": "3",
        "LLMSRV_GPU_MEMORY_UTILIZATION": "0.5",
        "LLMSRV_STRICT_FIELDS": "true",
        "LLMSRV_CACHE_DIR": "/cache",
        "LLMSRV_KV_CACHE_BITS": "8",
        "LLMSRV_OVERRIDES": "max_num_sequence=4",
    }
    config = config_from_environment(environment)
    assert config == parse([], environment)
    assert (config.model, config.threads) == (["a=x.gguf", "b=y.gguf"], 3)
    assert (config.gpu_memory_utilization, config.strict_fields) == (0.5, True)
    assert (config.cache_dir, config.kv_cache_bits) == (Path("/cache"), 8)
    assert config.max_num_sequence == 4


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("PORT", "eighty", "LLMSRV_PORT: expected a whole number, got 'eighty'"),
        ("BACKEND", "abacus", "LLMSRV_BACKEND: expected one of auto, "),
        ("KV_CACHE_BITS", "9", "LLMSRV_KV_CACHE_BITS: expected one of 16, 8, 32, got '9'"),
        ("STRICT_FIELDS", "perhaps", "LLMSRV_STRICT_FIELDS: expected 1, 0, true or false, got "),
        ("ALLOW_ORIGINS", "[1]", "LLMSRV_ALLOW_ORIGINS: expected a JSON list of strings, got [1]"),
        ("OVERRIDES", "port=1", "--overrides: expected K=V with one of "),
        ("OVERRIDES", "max_num_sequence=x", "--overrides: max_num_sequence: expected a whole "),
    ],
)
def test_a_bad_variable_is_a_startup_error_with_the_sentence_of_the_command_line(
    name: str,
    value: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    environment = {f"LLMSRV_{name}": value}
    with pytest.raises(StartupError) as caught:
        config_from_environment(environment)
    assert str(caught.value).startswith(message)
    with pytest.raises(SystemExit):
        parse([], environment)
    assert capsys.readouterr().err.endswith(f"llmsrv: error: {caught.value}\n")
    monkeypatch.setenv(*environment.popitem())
    with pytest.raises(StartupError):
        build()
