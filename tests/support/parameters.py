"""Parameters for tests: a few in quick runs, all of them in runs with slow tests."""

from collections.abc import Iterable
from typing import Any

import pytest

# The files whose tests run again with sanitizers, guard pages and on AArch64.
KERNEL_TESTS = (
    *(f"tests/backend/cpu/test_{name}.py" for name in "operations linear attention models".split()),
    "tests/backend/sampling/test_backends.py",
)


def slow_but(values: Iterable[Any], *quick: Any) -> list[Any]:
    """The values, all marked slow except the quick ones."""
    return [
        value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values
    ]
