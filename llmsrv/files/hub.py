"""Models on the Hugging Face hub, named hf:org/name[:file]: which files of a repository we use, and
where they are in the cache.

We fetch either one GGUF model (all parts if it is split) or the safetensors weights with their JSON
and Jinja files; never a pickle, never code.  The cache has the layout of huggingface_hub, plus
listings/:

    models--org--name/blobs/        file contents, named by digest; NAME.part is incomplete
    models--org--name/snapshots/    COMMIT/file, links to the blobs
    models--org--name/refs/main     the commit of the last fetch that completed
    models--org--name/listings/     COMMIT.json: the names of all files in the repository
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
FILES_WITH_WEIGHTS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
)


@dataclass(frozen=True)
class HubName:
    """hf:org/name or hf:org/name:file, where file is a path in the repository."""

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


def parse_hub_name(name: str) -> HubName:
    """Parses the name; raises StartupError if it is not a hub name."""
    match = NAME.fullmatch(name)
    if match is None:
        raise StartupError(f"{name!r} is not a hub name; write hf:org/name or hf:org/name:file")
    return HubName(*match.groups())


def cached_path(name: str, folder: Path) -> Path | None:
    """The model's file or folder if it is completely in the cache, else None."""
    wanted = parse_hub_name(name)
    repository = folder / wanted.folder
    snapshot = last_snapshot(repository)
    if snapshot is None:
        return None
    try:
        names = json.loads((repository / "listings" / f"{snapshot.name}.json").read_text())
        files = choose_files(wanted, names)
    except (OSError, ValueError, StartupError):
        return None
    is_complete = all((snapshot / file).is_file() for file in files)
    return model_path(snapshot, files) if is_complete else None


def last_snapshot(repository: Path) -> Path | None:
    """The snapshot folder of the last fetched commit, or None."""
    try:
        commit = (repository / "refs" / "main").read_text().strip()
    except (OSError, ValueError):
        return None
    snapshot = repository / "snapshots" / commit
    return snapshot if DIGEST.fullmatch(commit) and snapshot.is_dir() else None


def choose_files(wanted: HubName, files: Collection[str]) -> list[str]:
    """Chooses the files to fetch: the named or only GGUF file, with all its parts; else the
    safetensors weights and the files that belong to them.  StartupError if there are neither."""
    ggufs = [file for file in files if file.endswith(".gguf") and _is_inside(file)]
    if wanted.file is not None:
        found = [file for file in ggufs if wanted.file in (file, file.removesuffix(".gguf"))]
        if not found:
            listed = _joined_names(ggufs)
            raise StartupError(f"{wanted} does not exist; GGUF files in the repository: {listed}")
        return _all_parts(found[0], wanted, ggufs)
    firsts = [file for file in ggufs if _is_model(file)]
    if len(firsts) == 1:
        return _all_parts(firsts[0], wanted, ggufs)
    weights = [file for file in files if WEIGHTS.fullmatch(file)]
    if weights:
        return [file for file in FILES_WITH_WEIGHTS if file in files] + sorted(weights)
    if firsts:
        raise StartupError(
            f"{wanted} has several GGUF files; name one, as in {wanted}:{firsts[0]}.  Files: "
            f"{_joined_names(firsts)}"
        )
    raise StartupError(f"{wanted} has neither a GGUF file nor safetensors weights")


def _is_inside(file: str) -> bool:
    """True if a file name from the hub cannot escape the folder it is put into."""
    path = PurePosixPath(file)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in file


def _is_model(file: str) -> bool:
    """True for the only or first part of a language model; False for an image projector."""
    split = SPLIT.fullmatch(file)
    is_first = split is None or file.endswith(f"-00001-of-{split[2]}.gguf")
    return is_first and not PurePosixPath(file).name.startswith("mmproj")


def _all_parts(file: str, wanted: HubName, ggufs: list[str]) -> list[str]:
    """Returns the file, or all parts of the split model it belongs to, in order."""
    split = SPLIT.fullmatch(file)
    if split is None:
        return [file]
    parts = [f"{split[1]}-{n:05}-of-{split[2]}.gguf" for n in range(1, int(split[2]) + 1)]
    missing = [part for part in parts if part not in ggufs]
    if missing:
        raise StartupError(f"{wanted} is missing a part of the model: {missing[0]}")
    return parts


def _joined_names(files: list[str]) -> str:
    return ", ".join(sorted(files)[:20]) or "none"


def model_path(snapshot: Path, files: list[str]) -> Path:
    return snapshot / files[0] if files[0].endswith(".gguf") else snapshot
