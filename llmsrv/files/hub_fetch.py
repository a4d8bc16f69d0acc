"""Fetches models from the Hugging Face hub.

huggingface_hub talks to the hub and follows redirects.  We store the files ourselves, because the
library starts over what an earlier process left unfinished, and checks no digest.  It is imported
only when something is fetched: the import takes a third of a second.
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
from llmsrv.files.hub import choose_files
from llmsrv.files.hub import model_path
from llmsrv.files.hub import parse_hub_name
from llmsrv.files.lock import locked
from llmsrv.files.progress import MEGABYTE
from llmsrv.files.progress import Progress

SHA1_LENGTH = 40
CHUNK_BYTES = 1 << 20
POLL_S = 0.2
TIMEOUT_S = 15.0


def fetch_from_hub(name: str, folder: Path, token: str | None, progress: TextIO) -> Path:
    """Fetches the current version from the hub; returns the model's file or folder.

    Resumes an earlier fetch that was interrupted.
    token   if None: HF_TOKEN, else the token that `hf auth login` stored
    Raises StartupError, which says what to do next; KeyboardInterrupt stops the fetch at once."""
    wanted = parse_hub_name(name)
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read once, by the import
    from huggingface_hub import get_token

    token = (token or get_token() or "").strip()
    if not re.fullmatch("[!-~]*", token):
        raise StartupError("the Hugging Face token contains characters that no token can have")
    with _as_startup_errors(wanted, folder, token):
        listing = _fetch_listing(wanted, token)
        files = choose_files(wanted, listing.files)
        repository = folder / wanted.folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (repository / "blobs").mkdir(parents=True, exist_ok=True)
        with locked(repository, progress):
            _fetch_all(wanted, listing, files, repository, token, progress)
    return model_path(repository / "snapshots" / listing.commit, files)


@dataclass(frozen=True)
class _Blob:
    """Content of a file on the hub.  digest: SHA-256 for a large file, else git's SHA-1."""

    digest: str
    size: int


@dataclass(frozen=True)
class _Listing:
    """A repository's current commit and its files by name."""

    commit: str
    files: dict[str, _Blob]


def _fetch_listing(wanted: HubName, token: str) -> _Listing:
    from huggingface_hub import HfApi

    info = HfApi(token=token or False).model_info(
        wanted.repository, files_metadata=True, timeout=TIMEOUT_S
    )
    files = {
        file.rfilename: _Blob((file.lfs.sha256 if file.lfs else file.blob_id) or "", file.size or 0)
        for file in info.siblings or ()
    }
    if not DIGEST.fullmatch(info.sha or ""):
        raise StartupError(f"{wanted}: the hub names no commit")
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

    digests = [_checked_digest(wanted, file, listing.files[file]) for file in files]
    blobs = [repository / "blobs" / digest for digest in digests]
    total_bytes = sum(listing.files[file].size for file in files)
    _check_space(repository, total_bytes - _fetched_bytes(blobs))
    headers = {"authorization": f"Bearer {token}"} if token else {}
    with _showing_progress(blobs, Progress(progress, f"fetching {wanted}", total_bytes)):
        for file, blob in zip(files, blobs):
            if not blob.exists():
                url = hf_hub_url(wanted.repository, file, revision=listing.commit)
                _download(url, headers, listing.files[file], blob)
            _link(repository / "snapshots" / listing.commit / file, blob)
    names = json.dumps(sorted(listing.files))
    _write_atomically(repository / "listings" / f"{listing.commit}.json", names)
    _write_atomically(repository / "refs" / "main", listing.commit)


def _checked_digest(wanted: HubName, file: str, blob: _Blob) -> str:
    if not DIGEST.fullmatch(blob.digest):
        raise StartupError(f"{wanted}: the hub names no digest for the file {file}")
    return blob.digest


def _download(url: str, headers: dict[str, str], blob: _Blob, target: Path) -> None:
    """Fetches the missing bytes of the file, checks its digest, and moves it into place."""
    from huggingface_hub.file_download import http_get

    part = _part_path(target)
    with open(part, "r+b" if part.exists() else "w+b") as file:
        start = file.seek(0, os.SEEK_END)
        if start < blob.size:
            http_get(url, file, resume_size=start, headers=headers, expected_size=blob.size)
        file.flush()
        os.fsync(file.fileno())
        if _hash_file(file, blob) != blob.digest:
            part.unlink()
            raise StartupError(
                f"the download from {url} does not match the digest that the hub lists; it was "
                "deleted.  Try again"
            )
    os.replace(part, target)


def _part_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _hash_file(file: BinaryIO, blob: _Blob) -> str:
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


def _write_atomically(file: Path, text: str) -> None:
    """Writes the file completely or not at all."""
    file.parent.mkdir(exist_ok=True)
    part = _part_path(file)
    part.write_text(text)
    os.replace(part, file)


@contextmanager
def _as_startup_errors(wanted: HubName, folder: Path, token: str) -> Iterator[None]:
    """Turns errors into a StartupError that names the next step and never shows the token."""
    from huggingface_hub import errors

    try:
        yield
    except StartupError:
        raise
    except errors.GatedRepoError:
        raise StartupError(
            f"to fetch {wanted} you must accept its terms: do so on its hub page, then give a "
            "token of that account with HF_TOKEN or --hf-token"
        ) from None
    except errors.RepositoryNotFoundError:
        raise StartupError(
            f"the hub has no model {wanted.repository}, or it is private: check the name, or give "
            "a token with HF_TOKEN or --hf-token"
        ) from None
    except Exception as error:  # network errors differ between versions of the library
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StartupError(
                f"no space for {wanted} in {folder}; free some, or choose another place with "
                "--cache-dir DIR"
            ) from None
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        if token:
            reason = reason.replace(token, "TOKEN")
        raise StartupError(
            f"{wanted} could not be fetched, and it is not complete in {folder}: {reason}\n"
            "Is this machine online, and is HF_HUB_OFFLINE unset?  Fetched parts are kept, and "
            f"'llmsrv pull {wanted}' resumes; or serve a model you have with --model PATH"
        ) from None


def _check_space(folder: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise StartupError(
            f"no space in {folder}: {needed_bytes // MEGABYTE} MB are needed and "
            f"{free_bytes // MEGABYTE} free; choose another place with --cache-dir DIR"
        )


@contextmanager
def _showing_progress(blobs: list[Path], bar: Progress) -> Iterator[None]:
    """Shows the growth of the files while the block runs."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(POLL_S):
            bar.show(_fetched_bytes(blobs))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
        bar.show(_fetched_bytes(blobs))
    finally:
        done.set()
        watcher.join()
        bar.end()


def _fetched_bytes(blobs: list[Path]) -> int:
    """Total size of the files so far, complete or not."""
    size_bytes = 0
    for path in {path for blob in blobs for path in (blob, _part_path(blob))}:
        with suppress(FileNotFoundError):
            size_bytes += path.stat().st_size
    return size_bytes
