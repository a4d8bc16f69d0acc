"""Which backend computes, and what happens where the fastest one cannot."""

import logging

import pytest

from llmsrv.backend.base import Embed
from llmsrv.backend.base import Limits
from llmsrv.backend.base import Program
from llmsrv.backend.choose import lay_out
from llmsrv.backend.cpu.backend import CPUOptions
from llmsrv.config import default_cache_dir
from llmsrv.errors import StartupError
from tests.support.tensors import random_tensor

PROGRAM = Program((), {"logits": 12}, 1, 1, 1, 16, vocab_size=12)
LIMITS = Limits(max_rows=8, max_logit_rows=8, max_slots=8, num_blocks=4)


def chosen(name, program=PROGRAM, cache_dir=None):
    options = CPUOptions(cache_dir or default_cache_dir(), num_threads=1)
    return lay_out(name, options, program, LIMITS, lambda: None)[1:]


def test_auto_takes_the_cpu_backend_and_says_why():
    name, reason = chosen("auto")
    assert name == "cpu" and reason.startswith("the fastest here") and "1 thread" in reason


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_a_backend_is_chosen_by_name(name):
    assert chosen(name)[0] == name and "asked for" in chosen(name)[1]


def test_an_unknown_backend_is_an_error_that_names_the_known():
    with pytest.raises(StartupError, match="'tpu'.*auto, cpu or reference"):
        chosen("tpu")


def test_without_a_compiler_numpy_computes_with_one_warning(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("CC", "no-such-compiler")
    with caplog.at_level(logging.WARNING):
        name, reason = chosen("auto", cache_dir=tmp_path)
    assert (name, reason) == ("reference", "none faster")
    [record] = caplog.records
    assert "no-such-compiler" in record.message and "pip install 'llmsrv[cc]'" in record.message
    with pytest.raises(StartupError, match="no-such-compiler"):
        chosen("cpu", cache_dir=tmp_path)


def test_with_a_compiler_that_fails_numpy_computes(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("CC", "false")
    with caplog.at_level(logging.WARNING):
        assert chosen("auto", cache_dir=tmp_path) == ("reference", "none faster")
    assert "false failed with 1" in caplog.records[-1].message
    assert "numpy computes instead" in caplog.records[-1].message


def test_a_program_that_the_cpu_backend_does_not_run_goes_to_numpy(caplog):
    table = random_tensor("t", "F32", (12, 4))
    late = Program((*PROGRAM.operations, Embed("x", table)), {"x": 4}, 1, 1, 1, 1024, 12)
    with caplog.at_level(logging.WARNING):
        assert chosen("auto", late)[0] == "reference"
    assert "1024" in caplog.text
