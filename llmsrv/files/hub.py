"""Models of the Hugging Face hub, named hf:org/name[:file]: what is chosen of a repository, and
where it is in the cache.

Of a repository come either one GGUF file, with the others of its parts where it is split, or the
weights in safetensors with their JSON and Jinja files: never a pickle, never code.  The folder has
the layout of the hub's own library:

    models--org--name/blobs/        contents by their digests; NAME.part is not whole yet
    models--org--name/snapshots/    COMMIT/file, links to them
    models--org--name/refs/main     the commit of the last fetch that came to its end
    models--org--name/listings/     COMMIT.json: the names of all its files, fetched or not
"""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from pathlib import PurePosixPath

from llmsrv.errors import StartupError

PREFIX = "hf:"
NAME = re.compile(r"hf:([A-Za-z0-9_.-]+)/([A-Za-z0-9_.-]+)(?::(.+))?")
DIGEST = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
SPLIT = re.compile(r"(.*)-\d{5}-of-(\d{5})\.gguf")
WEIGHTS = re.compile(r"model(\.safetensors)?(-\d{5}-of-\d{5})?\.safetensors")
BESIDE_WEIGHTS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
)


@dataclass(frozen=True)
class HubName:
    """hf:org/name or hf:org/name:file; the file is as in its repository."""

    org: str
    name: str
    file: str | None

    @property
    def repository(self) -> str:
        return f"{self.org}/{self.name}"

    @property
    def folder(self) -> str:
        return f"models--{self.org}--{self.name}"

    def __str__(self) -> str:
        return f"{PREFIX}{self.repository}" + (f":{self.file}" if self.file else "")


def parse(name: str) -> HubName:
    """StartupError when it is no name of a model on the hub."""
    match = NAME.fullmatch(name)
    if match is None:
        raise StartupError(f"{name!r} is no name on the hub; write hf:org/name or hf:org/name:file")
    return HubName(*match.groups())


def cached(name: str, folder: Path) -> Path | None:
    """The model's file or folder when all of it was fetched before."""
    wanted = parse(name)
    repository = folder / wanted.folder
    snapshot = last_snapshot(repository)
    if snapshot is None:
        return None
    try:
        names = json.loads((repository / "listings" / f"{snapshot.name}.json").read_text())
        files = choose(wanted, names)
    except (OSError, ValueError, StartupError):
        return None
    return place(snapshot, files) if all((snapshot / file).is_file() for file in files) else None


def last_snapshot(repository: Path) -> Path | None:
    """The folder of the commit that was fetched last."""
    try:
        commit = (repository / "refs" / "main").read_text().strip()
    except (OSError, ValueError):
        return None
    snapshot = repository / "snapshots" / commit
    return snapshot if DIGEST.fullmatch(commit) and snapshot.is_dir() else None


def choose(wanted: HubName, files: Collection[str]) -> list[str]:
    """What to fetch of a repository's files: the GGUF file that is named, or the only one, with its
    parts; else weights in safetensors with what belongs to them.  StartupError for neither."""
    ggufs = [file for file in files if file.endswith(".gguf") and _is_inside(file)]
    if wanted.file is not None:
        found = [file for file in ggufs if wanted.file in (file, file.removesuffix(".gguf"))]
        if not found:
            raise StartupError(f"{wanted} is not there; its GGUF files: {_listed(ggufs)}")
        return _parts(found[0], wanted, ggufs)
    firsts = [file for file in ggufs if _is_model(file)]
    if len(firsts) == 1:
        return _parts(firsts[0], wanted, ggufs)
    weights = [file for file in files if WEIGHTS.fullmatch(file)]
    if weights:
        return [file for file in BESIDE_WEIGHTS if file in files] + sorted(weights)
    if firsts:
        raise StartupError(
            f"{wanted} has several GGUF files; name one as {wanted}:{firsts[0]}.  There are: "
            f"{_listed(firsts)}"
        )
    raise StartupError(f"{wanted} has neither a GGUF file nor weights in safetensors")


def _is_inside(file: str) -> bool:
    """Whether a name that the hub tells stays in the folder that it is put into."""
    path = PurePosixPath(file)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in file


def _is_model(file: str) -> bool:
    """Whether it is a language model's only or first part, and no projector of images."""
    split = SPLIT.fullmatch(file)
    is_first = split is None or file.endswith(f"-00001-of-{split[2]}.gguf")
    return is_first and not PurePosixPath(file).name.startswith("mmproj")


def _parts(file: str, wanted: HubName, ggufs: list[str]) -> list[str]:
    """The file, or all parts of the model that it is one of, in order."""
    split = SPLIT.fullmatch(file)
    if split is None:
        return [file]
    parts = [f"{split[1]}-{n:05}-of-{split[2]}.gguf" for n in range(1, int(split[2]) + 1)]
    missing = [part for part in parts if part not in ggufs]
    if missing:
        raise StartupError(f"{wanted} lacks a part of its model: {missing[0]}")
    return parts


def _listed(files: list[str]) -> str:
    return ", ".join(sorted(files)[:20]) or "none"


def place(snapshot: Path, files: list[str]) -> Path:
    return snapshot / files[0] if files[0].endswith(".gguf") else snapshot
