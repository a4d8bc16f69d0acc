"""The files of kernels/cpu form layers: no circle among their includes or their calls."""

import re
from graphlib import CycleError
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[3] / "kernels/cpu"
TEXTS = {path.name: path.read_text() for path in sorted(KERNELS.glob("*.[ch]"))}

COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
INCLUDE = re.compile(r'^#include "(.+)"', re.MULTILINE)
# A definition starts in the first column; calls, unlike declarations, are indented or in a macro.
DEFINITION = re.compile(r"^(?=[A-Za-z])([\w *]*?)\b(\w+)\([^;{}]*\)\s*\{", re.MULTILINE)
CALL = re.compile(r"(?<!->)(?<!\.)\b(\w+)\(")


def includes(texts):
    """File -> the kernel files it includes."""
    return {name: set(INCLUDE.findall(text)) for name, text in texts.items()}


def calls(texts):
    """File -> the files that define functions it calls.

    If several files define a function, each for other instruction sets, all of them count.
    """
    texts = {name: COMMENT.sub("", text) for name, text in texts.items()}
    own = {name: set() for name in texts}
    public = {name: set() for name in texts}
    for name, text in texts.items():
        for before, function in DEFINITION.findall(text):
            own[name].add(function)
            if name.endswith(".h") or not {"static", "INLINE"} & set(before.split()):
                public[name].add(function)
    called = {name: set(CALL.findall(bodies(text))) - own[name] for name, text in texts.items()}
    return {
        name: {other for other in texts if called[name] & public[other]} for name in texts
    }


def bodies(text):
    """The lines that can hold calls: indented ones, macros, and functions of one line."""
    lines = (line for line in text.splitlines() if line[:1] in (" ", "#") or "{" in line)
    return "\n".join(line.partition("{")[2] if line[:1].isalpha() else line for line in lines)


def circle(graph):
    """The names along a circle, or an empty list."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


@pytest.mark.parametrize("relation", [includes, calls])
def test_kernel_files_form_no_circle(relation):
    assert circle(relation(TEXTS)) == []


def test_a_circle_of_calls_is_found():
    texts = {
        "a.h": "int a(int x);",
        "a.c": '#include "a.h"\n#include "b.h"\nint a(int x)\n{\n    return b(x);\n}\n',
        "b.h": "static inline int b(int x) { return c(x); }",
        "c.c": "int c(\n    int x,\n    int y)\n{\n    return a(x);  /* a circle */\n}\n",
    }
    assert set(circle(calls(texts))) == {"a.c", "b.h", "c.c"}
    assert circle(includes(texts)) == []


def test_lines_of_kernels_have_at_most_100_columns():
    long = [
        f"{name}:{number}"
        for name, text in TEXTS.items()
        for number, line in enumerate(text.splitlines(), 1)
        if len(line) > 100
    ]
    assert long == []
