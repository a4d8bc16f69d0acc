"""Every launcher starts two processes: one with asyncio and no numpy, one the other way round."""

import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.gguf_writer import write_tiny_llama
from tests.support.sdk import openai_client
from tests.support.server import ROOT
from tests.support.server import run_server

# Python runs this at start (sitecustomize).  At exit it writes which modules the process loaded, so
# the program itself needs no hook for it.
REPORT = """
import atexit, os, sys
def report():
    words = ("numpy", "asyncio", "h11", "llmsrv.asgi", "llmsrv.api", "llmsrv.engine.process")
    loaded = ",".join(w for w in words if w in sys.modules)
    with open(os.environ["REPORT_TO"], "a") as file:
        file.write(f"{loaded}\\n")
if "REPORT_TO" in os.environ:
    atexit.register(report)
    import multiprocessing.util
    multiprocessing.util.Finalize(None, report, exitpriority=0)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="module")
def zipapp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("bundle") / "llmsrv.pyz"
    subprocess.run([sys.executable, "-m", "llmsrv.bundle", str(target)], cwd=ROOT, check=True)
    return target


def complete(url: str, model: str = "tiny") -> int:
    client = openai_client(url)
    answer = client.completions.create(model=model, prompt="hello", max_tokens=4)
    assert answer.usage is not None
    return answer.usage.completion_tokens


@pytest.mark.parametrize(
    "launcher",
    [
        "script",
        pytest.param("module", marks=pytest.mark.slow),
        pytest.param("console", marks=pytest.mark.slow),
        pytest.param("zipapp", marks=pytest.mark.slow),
    ],
)
def test_server_and_engine_load_only_their_own_modules(
    launcher: str, model: Path, zipapp: Path, tmp_path: Path
) -> None:
    console = "from llmsrv.cli import main; raise SystemExit(main())"  # what pip writes
    commands: dict[str, tuple[Sequence[str], Path]] = {
        "script": ((sys.executable, "llmsrv.py"), ROOT),
        "module": ((sys.executable, "-m", "llmsrv"), ROOT),
        "console": ((sys.executable, "-c", console), ROOT),
        "zipapp": ((sys.executable, str(zipapp)), tmp_path),
    }
    command, cwd = commands[launcher]
    (tmp_path / "sitecustomize.py").write_text(REPORT)
    report = tmp_path / "report"
    environment = {"PYTHONPATH": str(tmp_path), "REPORT_TO": str(report)}
    with run_server(
        "--model", str(model), command=command, cwd=cwd, environment=environment
    ) as server:
        assert complete(server.url) > 0
        assert server.stop() == 0
    worlds = [set(line.split(",")) for line in report.read_text().splitlines()]
    server_world = next(world for world in worlds if "llmsrv.api" in world)
    engine_world = next(world for world in worlds if "llmsrv.engine.process" in world)
    assert "numpy" not in server_world
    assert "numpy" in engine_world
    assert not engine_world & {"asyncio", "h11", "llmsrv.asgi", "llmsrv.api"}


def test_a_zipapp_has_the_same_exit_codes(zipapp: Path, tmp_path: Path) -> None:
    def code(*options: str) -> int:
        return subprocess.run(
            [sys.executable, str(zipapp), *options], cwd=tmp_path, capture_output=True
        ).returncode

    assert code("--version") == 0
    assert code("--port", "x") == 2
    assert code("--port", "0", "--model", "none.gguf") == 1


@pytest.mark.slow
def test_the_wheel_and_the_zipapp_serve_in_a_clean_environment(
    model: Path, zipapp: Path, tmp_path: Path
) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", str(source)], check=True)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    for command in ([str(tmp_path / "venv/bin/llmsrv")], [str(python), str(zipapp)]):
        with run_server(
            "--model", str(model), command=command, cwd=tmp_path, environment=environment
        ) as server:
            assert complete(server.url) > 0
            assert server.stop() == 0
    kernels = "from importlib.resources import files; print(files('llmsrv') / 'kernels')"
    ended = subprocess.run([python, "-c", kernels], cwd=tmp_path, capture_output=True, text=True)
    assert (Path(ended.stdout.strip()) / "README.md").exists()
