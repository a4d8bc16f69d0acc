"""Lists and removes cached models: fetched files in "models", hub repositories in "hf"."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmsrv.errors import StartupError
from llmsrv.files.hub import PREFIX
from llmsrv.files.hub import last_snapshot
from llmsrv.files.source import DEFAULT_DOWNLOAD


@dataclass(frozen=True)
class CachedModel:
    """A model in the cache.

    name        the value for --model
    size_bytes  on disk
    path        its file, or the folder with its files; None while the download is incomplete
    root        the file or folder that is deleted when the model is removed
    """

    name: str
    size_bytes: int
    path: Path | None
    root: Path


def cached_models(cache_dir: Path) -> list[CachedModel]:
    """All models in the cache, sorted by name."""
    found = [*_files(cache_dir / "models"), *_repositories(cache_dir / "hf")]
    return sorted(found, key=lambda model: model.name)


def remove_model(name: str, cache_dir: Path) -> CachedModel:
    """Deletes the model and returns it; StartupError if it is not there or cannot be deleted."""
    models = {model.name: model for model in cached_models(cache_dir)}
    if name not in models:
        known = ", ".join(models) or "none"
        raise StartupError(f"no model {name!r} in the cache {cache_dir}; there are: {known}")
    root = models[name].root
    try:
        if root.is_dir():
            shutil.rmtree(root)
        else:
            root.unlink()
    except OSError as error:
        raise StartupError(f"cannot remove {error.filename}: {error.strerror}") from None
    return models[name]


def _files(folder: Path) -> Iterator[CachedModel]:
    for path in folder.glob("*.gguf"):
        is_default = path.name == DEFAULT_DOWNLOAD.file_name
        name = DEFAULT_DOWNLOAD.name if is_default else path.stem
        yield CachedModel(name, path.stat().st_size, path, root=path)


def _repositories(folder: Path) -> Iterator[CachedModel]:
    for root in folder.glob("models--*--*"):
        org, name = root.name.removeprefix("models--").split("--", 1)
        size_bytes = sum(path.stat().st_size for path in root.glob("blobs/*"))
        yield CachedModel(f"{PREFIX}{org}/{name}", size_bytes, last_snapshot(root), root)
