"""Which backend an engine runs on, and what happens if the fastest one cannot run."""

import dataclasses
import logging

import pytest

from llmsrv import config
from llmsrv.backend import choose
from llmsrv.backend.base import Limits
from llmsrv.backend.choose import BACKENDS
from llmsrv.backend.choose import run_on_backend
from llmsrv.backend.cpu.backend import CPUOptions
from llmsrv.backend.cuda import driver
from llmsrv.backend.cuda.backend import CUDAOptions
from llmsrv.backend.program import Embed
from llmsrv.backend.program import Program
from llmsrv.backend.quants.random_tensors import random_tensor
from llmsrv.config import default_cache_dir
from llmsrv.errors import StartupError

PROGRAM = Program((), {"logits": 12}, 1, 1, 1, 16, vocab_size=12)
LIMITS = Limits(max_rows=8, max_logit_rows=8, max_slots=8, num_blocks=4)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """The machine has no NVIDIA driver, whatever it or another test has loaded."""
    monkeypatch.setattr(driver, "LIBRARY", "no-such-library.so")


def chosen(name, program=PROGRAM, cache_dir=None, prepare=lambda backend: None):
    """The name of the backend that compiles the program, and why it was chosen."""

    def compile(backend):
        prepare(backend)
        return backend.compile(program, LIMITS, lambda: None)

    options = {"cpu": {"threads": 1}}
    backend, reason, _ = run_on_backend(name, options, cache_dir or default_cache_dir(), compile)
    return backend.name, reason


def test_auto_takes_the_cpu_backend_and_says_why():
    name, reason = chosen("auto")
    assert name == "cpu" and reason.startswith("the fastest here") and "1 thread" in reason


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_a_backend_is_chosen_by_name(name):
    assert chosen(name)[0] == name and "as requested" in chosen(name)[1]


def test_an_unknown_backend_is_an_error_that_names_those_there_are():
    with pytest.raises(StartupError, match="'tpu'.*auto, cuda, cpu or reference"):
        chosen("tpu")


def test_without_a_compiler_numpy_computes_with_one_warning(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("CC", "no-such-compiler")
    with caplog.at_level(logging.WARNING):
        assert chosen("auto", cache_dir=tmp_path) == (
            "reference", "the fastest here: numpy in float32"
        )
    [record] = caplog.records
    assert record.levelno == logging.WARNING and "no-such-compiler" in record.message
    assert "pip install 'llmsrv[cc]'" in record.message
    with pytest.raises(StartupError, match="no-such-compiler"):
        chosen("cpu", cache_dir=tmp_path)


def test_with_a_compiler_that_fails_numpy_computes(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("CC", "false")
    with caplog.at_level(logging.WARNING):
        assert chosen("auto", cache_dir=tmp_path)[0] == "reference"
    assert "false failed with 1" in caplog.records[-1].message
    assert "numpy computes instead, about ten times slower" in caplog.records[-1].message


def test_a_program_that_the_cpu_backend_does_not_support_runs_on_numpy(caplog):
    table = random_tensor("t", "F32", (12, 4))
    late = Program((*PROGRAM.operations, Embed("x", table)), {"x": 4}, 1, 1, 1, 1024, 12)
    prepared = []
    with caplog.at_level(logging.WARNING):
        assert chosen("auto", late, prepare=prepared.append)[0] == "reference"
    assert "1024" in caplog.text
    # Sizes are chosen anew for the backend that runs: its positions take another number of bytes.
    assert [backend.name for backend in prepared] == ["cpu", "reference"]
    cpu, reference = (backend.kv_position_bytes(late) for backend in prepared)
    assert cpu < reference == 2 * 1024 * 4


def test_an_error_that_another_backend_would_not_solve_is_final(caplog):
    def too_little_memory(backend):
        raise StartupError("too little memory")

    with pytest.raises(StartupError, match="too little memory"):
        chosen("auto", prepare=too_little_memory)
    assert not caplog.records


def test_a_backend_is_imported_only_when_it_is_tried(monkeypatch):
    def load_later():
        raise AssertionError("imported")

    entry = choose.Entry(load_later, "it computes instead")
    monkeypatch.setattr(choose, "BACKENDS", {"cpu": BACKENDS["cpu"], "later": entry})
    assert chosen("auto")[0] == "cpu"


def test_the_option_backend_lists_the_backends_there_are():
    assert config.BACKENDS == ("auto", *BACKENDS)


def test_each_backend_option_belongs_to_a_backend_and_has_its_default():
    given = config.engine_config(config.Config(), default_cache_dir(), None).backend_options
    assert given.keys() <= BACKENDS.keys()
    cpu, cuda = (
        dataclasses.asdict(options(default_cache_dir())) for options in (CPUOptions, CUDAOptions)
    )
    assert given["cpu"] == {name: cpu[name] for name in given["cpu"]}
    assert cpu.keys() - given["cpu"].keys() == {"cache_dir", "tiers"}
    assert given["cuda"] == {name: cuda[name] for name in given["cuda"]}
    assert cuda.keys() - given["cuda"].keys() == {"cache_dir", "warms_up"}


def test_a_machine_without_a_gpu_gets_one_quiet_line(caplog):
    with caplog.at_level(logging.INFO):
        assert chosen("auto")[0] == "cpu"
    [record] = caplog.records
    assert record.levelno == logging.INFO
    assert record.message == "no GPU is used: there is no NVIDIA driver; the CPU computes instead"
    with pytest.raises(StartupError, match="^no GPU is used: there is no NVIDIA driver$"):
        chosen("cuda")
