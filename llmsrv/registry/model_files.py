"""The files of a model: how large they are, and whether they are still the same."""

import glob
from collections.abc import Iterable
from pathlib import Path


def total_bytes(path: Path) -> int:
    """Size of a model: of its file, all parts of a split file, or the weights in its folder."""
    return sum(file.stat().st_size for file in _files_of(path, "*.safetensors"))


def version_of(paths: Iterable[Path]) -> object:
    """Differs if a file of the models has been replaced or changed; None while one is missing."""
    try:
        files = [(file, file.stat()) for path in paths for file in _files_of(path, "*")]
    except OSError:
        return None
    return [(file, each.st_ino, each.st_size, each.st_mtime_ns) for file, each in files]


def _files_of(path: Path, pattern: str) -> list[Path]:
    """A model's file, all parts of a split file, or the files in its folder that match."""
    if path.is_dir():
        return sorted(path.glob(pattern))
    parts = path.parent.glob(glob.escape(path.name).replace("-00001-of-", "-*-of-"))
    return sorted(parts) or [path]
