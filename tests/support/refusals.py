"""Files that must not be opened."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llmsrv.errors import ModelError


def refusal_of(open_file: Callable[[Path], object], path: Path, at: Path | None = None) -> str:
    """The message of the ModelError, which must take less than a second of work and name the file
    at fault: `at`, else `path` itself."""
    start = time.process_time()
    with pytest.raises(ModelError) as caught:
        open_file(path)
    assert time.process_time() - start < 1
    assert str(caught.value).startswith(f"{at or path}: ")
    return str(caught.value).removeprefix(f"{at or path}: ")
