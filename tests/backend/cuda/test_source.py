"""Includes pasted into the text of kernels, and the modules compiled from it."""

from types import SimpleNamespace
from typing import Any

import pytest

from llmsrv.backend.cuda import source
from llmsrv.backend.cuda.source import Kernels
from llmsrv.backend.cuda.source import pasted

SOURCES = {
    "norm.cu": '#include <cuda_fp16.h>\n#include "common.cuh"\n#include "ptx.cuh"\nkernel\n',
    "common.cuh": "common\n",
    "ptx.cuh": '#include "common.cuh"\nptx\n',
}


def test_included_files_are_pasted_once_and_lines_keep_their_file_and_number() -> None:
    assert pasted("norm.cu", SOURCES).splitlines() == [
        '#line 1 "norm.cu"',
        "#include <cuda_fp16.h>",
        '#line 1 "common.cuh"',
        "common",
        '#line 3 "norm.cu"',
        '#line 1 "ptx.cuh"',
        '#line 2 "ptx.cuh"',
        "ptx",
        '#line 4 "norm.cu"',
        "kernel",
    ]


def test_a_missing_include_is_an_error() -> None:
    with pytest.raises(KeyError, match="common.cuh"):
        pasted("norm.cu", {"norm.cu": SOURCES["norm.cu"]})


def test_a_module_is_made_once_for_each_set_of_macros(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def new_module(code: str, options: tuple[str, ...]) -> Any:
        made.append((code, options))
        return SimpleNamespace(get_function=lambda name: (options[1:], name))

    monkeypatch.setattr(source, "kernel_source", lambda stem: f"text of {stem}")
    kernels = Kernels(SimpleNamespace(RawModule=new_module), BFLOAT16=1)
    assert kernels.get("norm", "norm", WIDTH=8) == (("-DBFLOAT16=1", "-DWIDTH=8"), "norm")
    assert kernels.get("norm", "add", WIDTH=8) == (("-DBFLOAT16=1", "-DWIDTH=8"), "add")
    assert kernels.get("norm", "norm") == (("-DBFLOAT16=1",), "norm")
    assert [options for _, options in made] == [
        ("-std=c++17", "-DBFLOAT16=1", "-DWIDTH=8"), ("-std=c++17", "-DBFLOAT16=1")
    ]
