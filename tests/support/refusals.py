"""Checks that files are refused."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llmsrv.errors import ModelError


def refusal_message(open_file: Callable[[Path], object], path: Path, at: Path | None = None) -> str:
    """Returns the message of the ModelError without the file name it starts with.

    The refusal must take less than one CPU second and name the file at fault: `at`, else `path`."""
    start = time.process_time()
    with pytest.raises(ModelError) as caught:
        open_file(path)
    assert time.process_time() - start < 1
    assert str(caught.value).startswith(f"{at or path}: ")
    return str(caught.value).removeprefix(f"{at or path}: ")
