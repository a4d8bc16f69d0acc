"""The stand-in has no name that the real cupy lacks, and no parameter that it would refuse.

The real one imports without a driver.  It has the same name as the stand-in, so another process
compares it with what this one lists.
"""

import inspect
import json
import os
import subprocess
import sys

import pytest

from tests.support.cuda import SITE
from tests.support.cuda import needs_emulation

pytestmark = [needs_emulation, pytest.mark.compat]

# Reads {"cupy.cuda.Stream": ["parameter", ...] or null, ...}; prints the names that cupy lacks, and
# names with a parameter that it lacks.  Functions in Cython have their signature in the first line
# of the docstring.
PROBE = """
import importlib, inspect, json, re, sys

import cupyx

def find(path):
    parts = path.split(".")
    found = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], 2):
        try:
            found = getattr(found, part)
        except AttributeError:
            found = importlib.import_module(".".join(parts[:i]))
    return found

def parameters_of(found):
    try:
        return set(inspect.signature(found).parameters)
    except (TypeError, ValueError):
        return set(re.findall(r"\\w+", (found.__doc__ or "kwargs").splitlines()[0]))

missing = []
for path, parameters in json.load(sys.stdin).items():
    try:
        found = find(path)
    except (AttributeError, ImportError):
        missing.append(path)
        continue
    real = parameters_of(found) if parameters else {"kwargs"}
    if not {"args", "kwargs"} & real:
        missing += [f"{path}({name})" for name in parameters if name not in real]
print(json.dumps(missing))
"""


def public_names(owner, path):
    """All dotted names of a module or class, each with the parameters of what it names."""
    for name in owner.__all__ if inspect.ismodule(owner) else vars(owner):
        if name.startswith("_"):
            continue
        member, dotted = inspect.getattr_static(owner, name), f"{path}.{name}"
        yield dotted, parameters_of(member)
        if inspect.ismodule(member) or inspect.isclass(member):
            yield from public_names(member, dotted)


def parameters_of(member):
    if not inspect.isfunction(member):
        return None
    return [name for name in inspect.signature(member).parameters if name != "self"]


def test_every_public_name_exists_in_the_real_cupy(cupy):
    import cupyx

    listed = {
        name: parameters
        for module in (cupy, cupyx)
        for name, parameters in public_names(module, module.__name__)
    }
    paths = [path for path in sys.path if path and path != str(SITE)]
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        input=json.dumps(listed),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    if "No module named 'cupy" in done.stderr:
        pytest.skip("cupy is not installed")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
