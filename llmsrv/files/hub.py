"""Fetches models from the Hugging Face hub by the name hf:org/name[:file], and finds them again.

Of a repository come either one GGUF file, with the others of its parts where it is split, or the
weights in safetensors with their JSON and Jinja files: never a pickle, never code.  The folder has
the hub's own layout, so its library resumes what was interrupted and fetches no file twice:

    models--org--name/blobs/        the files' contents
    models--org--name/snapshots/    COMMIT/file, links to them
    models--org--name/refs/main     the last commit that was fetched whole

huggingface_hub is imported only when something is fetched: that takes a third of a second.
"""

import errno
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Collection
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pathlib import PurePosixPath
from typing import TextIO

from llmsrv.errors import StartupError
from llmsrv.files.progress import MEGABYTE
from llmsrv.files.progress import Progress

PREFIX = "hf:"
NAME = re.compile(r"hf:([A-Za-z0-9_.-]+)/([A-Za-z0-9_.-]+)(?::(.+))?")
COMMIT = re.compile("[0-9a-f]{7,64}")
SPLIT = re.compile(r"(.*)-\d{5}-of-(\d{5})\.gguf")
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
BESIDE_WEIGHTS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
)
POLL_S = 0.2
TIMEOUT_S = 15.0


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
    """The model's file or folder when it was fetched before, as far as its file names tell."""
    wanted = parse(name)
    snapshot = last_snapshot(folder / wanted.folder)
    if snapshot is None:
        return None
    files = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*")]
    try:
        return _place(snapshot, choose(wanted, files))
    except StartupError:  # it was fetched for another of its files
        return None


def last_snapshot(repository: Path) -> Path | None:
    """Where the last commit is that was fetched whole."""
    try:
        commit = (repository / "refs" / "main").read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    snapshot = repository / "snapshots" / commit
    return snapshot if COMMIT.fullmatch(commit) and snapshot.is_dir() else None


def fetch(name: str, folder: Path, token: str | None, progress: TextIO) -> Path:
    """The model's file or folder as the hub has it now; files that are there are not fetched again.

    token   else HF_TOKEN, else what `hf auth login` has left
    Raises StartupError with the next step to take; KeyboardInterrupt ends it at once."""
    wanted = parse(name)
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read once, by the import
    from huggingface_hub import hf_hub_download

    with _explained(wanted, folder):
        commit, sizes = _listing(wanted, token)
        files = choose(wanted, sizes)
        repository = folder / wanted.folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        total = sum(sizes[file] for file in files)
        _check_space(folder, total - _bytes_in(repository / "blobs"))
        with _watched(repository / "blobs", Progress(progress, f"fetching {wanted}", total)):
            for file in files:
                hf_hub_download(
                    wanted.repository, file, revision=commit, cache_dir=folder, token=token
                )
        _note_commit(repository, commit)
    return _place(repository / "snapshots" / commit, files)


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


def _place(snapshot: Path, files: list[str]) -> Path:
    return snapshot / files[0] if files[0].endswith(".gguf") else snapshot


# ---- The hub


def _listing(wanted: HubName, token: str | None) -> tuple[str, dict[str, int]]:
    """The commit that is current, and its files with their sizes in bytes."""
    from huggingface_hub import HfApi

    info = HfApi(token=token).model_info(
        wanted.repository, files_metadata=True, timeout=TIMEOUT_S
    )
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    if info.sha is None or not COMMIT.fullmatch(info.sha):
        raise StartupError(f"{wanted}: the hub tells no commit of it")
    return info.sha, sizes


@contextmanager
def _explained(wanted: HubName, folder: Path) -> Iterator[None]:
    """Turns what goes wrong into a StartupError that names the next step."""
    from huggingface_hub import errors

    try:
        yield
    except StartupError:
        raise
    except errors.GatedRepoError:
        raise StartupError(
            f"{wanted} is there for those who accept its terms: do so on its page of the hub, then "
            "give a token of that account with HF_TOKEN or --hf-token"
        ) from None
    except errors.RepositoryNotFoundError:
        raise StartupError(
            f"the hub has no model {wanted.repository}, or it is private: check the name, or give "
            "a token with HF_TOKEN or --hf-token"
        ) from None
    except Exception as error:  # the network's errors differ from version to version
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StartupError(
                f"no space for {wanted} in {folder}; free some, or choose another place with "
                "--cache-dir DIR"
            ) from None
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        raise StartupError(
            f"{wanted} could not be fetched, and it is not whole in the cache {folder}: {reason}\n"
            "Is this machine online, and HF_HUB_OFFLINE not set?  What was fetched is kept, and "
            f"'llmsrv pull {wanted}' goes on with it; or serve a model you have with --model PATH"
        ) from None


def _check_space(folder: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise StartupError(
            f"no space in {folder}: {needed_bytes // MEGABYTE} MB are needed and "
            f"{free_bytes // MEGABYTE} free; choose another place with --cache-dir DIR"
        )


def _note_commit(repository: Path, commit: str) -> None:
    """The whole of it is there: from now on it is found without asking the hub."""
    refs = repository / "refs"
    refs.mkdir(exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=refs, delete=False) as part:
        part.write(commit)
    os.replace(part.name, refs / "main")


@contextmanager
def _watched(blobs: Path, bar: Progress) -> Iterator[None]:
    """Shows how the files grow while the block runs."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(POLL_S):
            bar.show(_bytes_in(blobs))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
        bar.show(_bytes_in(blobs))
    finally:
        done.set()
        watcher.join()
        bar.end()


def _bytes_in(folder: Path) -> int:
    sizes = 0
    for path in folder.glob("*"):
        try:
            sizes += path.stat().st_size
        except FileNotFoundError:  # it has just got its final name
            pass
    return sizes
