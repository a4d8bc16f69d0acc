"""Options from the environment alone, as hosts of the application use them."""

from pathlib import Path

import pytest

from llmsrv.app import build
from llmsrv.cli import parse
from llmsrv.config import Config
from llmsrv.errors import StartupError
from llmsrv.options import config_from_environment


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
