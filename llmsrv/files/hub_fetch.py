"""Fetches models from the Hugging Face hub.

Its library asks the hub and follows the redirects; keeping files is ours, since the library begins
anew what an earlier process has left, and checks no digest.  It is imported only when something is
fetched: that takes a third of a second.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from typing import TextIO

from llmsrv.errors import StartupError
from llmsrv.files.hub import DIGEST
from llmsrv.files.hub import HubName
from llmsrv.files.hub import choose
from llmsrv.files.hub import parse
from llmsrv.files.hub import place
from llmsrv.files.lock import locked
from llmsrv.files.progress import MEGABYTE
from llmsrv.files.progress import Progress

SHA1_LENGTH = 40
CHUNK_BYTES = 1 << 20
POLL_S = 0.2
TIMEOUT_S = 15.0


def fetch_from_hub(name: str, folder: Path, token: str | None, progress: TextIO) -> Path:
    """The model's file or folder as the hub has it now; goes on where an earlier fetch has ended.

    token   else HF_TOKEN, else what `hf auth login` has left
    Raises StartupError with the next step to take; KeyboardInterrupt ends it at once."""
    wanted = parse(name)
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read once, by the import
    from huggingface_hub import get_token

    token = (token or get_token() or "").strip()
    if not re.fullmatch("[!-~]*", token):
        raise StartupError("the token for the hub has characters that no token has")
    with _explained(wanted, folder, token):
        listing = _list(wanted, token)
        files = choose(wanted, listing.files)
        repository = folder / wanted.folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (repository / "blobs").mkdir(parents=True, exist_ok=True)
        with locked(repository, progress):
            _fetch_all(wanted, listing, files, repository, token, progress)
    return place(repository / "snapshots" / listing.commit, files)


@dataclass(frozen=True)
class _Blob:
    """What a file of the hub holds.  digest: SHA-256 of a large file, of others git's SHA-1."""

    digest: str
    size: int


@dataclass(frozen=True)
class _Listing:
    """A repository's current commit, and its files by name."""

    commit: str
    files: dict[str, _Blob]


def _list(wanted: HubName, token: str) -> _Listing:
    from huggingface_hub import HfApi

    info = HfApi(token=token or False).model_info(
        wanted.repository, files_metadata=True, timeout=TIMEOUT_S
    )
    files = {
        file.rfilename: _Blob((file.lfs.sha256 if file.lfs else file.blob_id) or "", file.size or 0)
        for file in info.siblings or ()
    }
    if not DIGEST.fullmatch(info.sha or ""):
        raise StartupError(f"{wanted}: the hub names no commit of it")
    return _Listing(info.sha or "", files)


def _fetch_all(
    wanted: HubName,
    listing: _Listing,
    files: list[str],
    repository: Path,
    token: str,
    progress: TextIO,
) -> None:
    from huggingface_hub import hf_hub_url

    blobs = [repository / "blobs" / _digest(wanted, file, listing.files[file]) for file in files]
    total_bytes = sum(listing.files[file].size for file in files)
    _check_space(repository, total_bytes - _bytes_of(blobs))
    headers = {"authorization": f"Bearer {token}"} if token else {}
    with _watched(blobs, Progress(progress, f"fetching {wanted}", total_bytes)):
        for file, blob in zip(files, blobs):
            if not blob.exists():
                url = hf_hub_url(wanted.repository, file, revision=listing.commit)
                _download(url, headers, listing.files[file], blob)
            _link(repository / "snapshots" / listing.commit / file, blob)
    names = json.dumps(sorted(listing.files))
    _replace(repository / "listings" / f"{listing.commit}.json", names)
    _replace(repository / "refs" / "main", listing.commit)


def _digest(wanted: HubName, file: str, blob: _Blob) -> str:
    if not DIGEST.fullmatch(blob.digest):
        raise StartupError(f"{wanted}: the hub names no digest of its file {file}")
    return blob.digest


def _download(url: str, headers: dict[str, str], blob: _Blob, target: Path) -> None:
    """Fetches what is missing of the file, checks all of it, and puts it in its place."""
    from huggingface_hub.file_download import http_get

    part = _part(target)
    with open(part, "r+b" if part.exists() else "w+b") as file:
        start = file.seek(0, os.SEEK_END)
        if start < blob.size:
            http_get(url, file, resume_size=start, headers=headers, expected_size=blob.size)
        file.flush()
        os.fsync(file.fileno())
        if _digest_of(file, blob) != blob.digest:
            part.unlink()
            raise StartupError(
                f"what was fetched from {url} is not what the hub lists; nothing of it was kept.  "
                "Try again"
            )
    os.replace(part, target)


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _digest_of(file: BinaryIO, blob: _Blob) -> str:
    digest = hashlib.sha256()
    if len(blob.digest) == SHA1_LENGTH:
        digest = hashlib.sha1(f"blob {blob.size}\0".encode())
    file.seek(0)
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def _link(link: Path, blob: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(blob, link.parent))


def _replace(file: Path, text: str) -> None:
    """Writes the file whole or not at all."""
    file.parent.mkdir(exist_ok=True)
    part = _part(file)
    part.write_text(text)
    os.replace(part, file)


@contextmanager
def _explained(wanted: HubName, folder: Path, token: str) -> Iterator[None]:
    """Turns what goes wrong into a StartupError that names the next step, and never the token."""
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
        if token:
            reason = reason.replace(token, "TOKEN")
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


@contextmanager
def _watched(blobs: list[Path], bar: Progress) -> Iterator[None]:
    """Shows how the files grow while the block runs."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(POLL_S):
            bar.show(_bytes_of(blobs))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
        bar.show(_bytes_of(blobs))
    finally:
        done.set()
        watcher.join()
        bar.end()


def _bytes_of(blobs: list[Path]) -> int:
    """What is there of the files, whole or not."""
    size_bytes = 0
    for path in {path for blob in blobs for path in (blob, _part(blob))}:
        with suppress(FileNotFoundError):
            size_bytes += path.stat().st_size
    return size_bytes
