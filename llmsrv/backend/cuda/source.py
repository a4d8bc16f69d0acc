"""The kernels of kernels/cuda: their source text, and functions compiled from it.

Each operation is one file, STEM.cu.  Macros set what is constant in a configuration, such as
HEAD_DIM, so each set of macros is a module of its own.  CuPy compiles a module with NVRTC for the
architecture of the current device and caches the result by text and options only.  A change in an
included file would go unnoticed, so our own includes are pasted into the text.
"""

import re
from collections.abc import Iterator
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np

from llmsrv.backend.source import kernel_sources

# Includes in angle brackets are CUDA's own and stay.
INCLUDE = re.compile(r'#include "([^"]+)"')
OPTIONS = ("-std=c++17",)

# A null pointer as an argument of a kernel.  For None, CuPy 13 passes 0xffffffff (its issue 9046).
NULL = np.uintp(0)

Macro = int | str


def or_null(array: Any) -> Any:
    """The array as an argument of a kernel, or a null pointer for None."""
    return NULL if array is None else array


class Kernels:
    """Compiles modules when they are first needed and keeps them.

    cp      the cupy module
    macros  defined in every module
    """

    def __init__(self, cp: Any, **macros: Macro) -> None:
        self._cp = cp
        self._macros = macros
        self._modules: dict[tuple[str, frozenset[tuple[str, Macro]]], Any] = {}
        self._functions: dict[tuple[str, str, frozenset[tuple[str, Macro]]], Any] = {}

    def get(self, stem: str, function: str, **macros: Macro) -> Any:
        """The cupy.RawKernel `function` of STEM.cu, compiled with these macros."""
        key = stem, function, frozenset(macros.items())
        if key not in self._functions:
            self._functions[key] = self._module(stem, macros).get_function(function)
        return self._functions[key]

    def _module(self, stem: str, macros: dict[str, Macro]) -> Any:
        key = stem, frozenset(macros.items())
        if key not in self._modules:
            code, options = kernel_source(stem), compile_options(self._macros | macros)
            self._modules[key] = self._cp.RawModule(code=code, options=options)
        return self._modules[key]


@cache
def kernel_source(stem: str) -> str:
    """The text of STEM.cu, with the files of kernels/cuda that it includes pasted in."""
    sources = {name: text.decode() for name, text in kernel_sources("cuda").items()}
    return pasted(f"{stem}.cu", sources)


def compile_options(macros: Mapping[str, Macro]) -> tuple[str, ...]:
    return *OPTIONS, *(f"-D{name}={value}" for name, value in sorted(macros.items()))


def pasted(name: str, sources: Mapping[str, str]) -> str:
    """The text of a file with its includes pasted in, each file once, at its first include.

    sources  file name -> text
    Line markers let compilers report errors by file and line.
    Raises KeyError if an included file is not among the sources.
    """
    return "\n".join(_lines(name, sources, {name})) + "\n"


def _lines(name: str, sources: Mapping[str, str], seen: set[str]) -> Iterator[str]:
    """Adds the names of the pasted files to `seen`."""
    yield f'#line 1 "{name}"'
    for number, line in enumerate(sources[name].splitlines(), 1):
        include = INCLUDE.match(line)
        if include is None:
            yield line
            continue
        included = include[1]
        if included not in seen:
            seen.add(included)
            yield from _lines(included, sources, seen)
        yield f'#line {number + 1} "{name}"'
