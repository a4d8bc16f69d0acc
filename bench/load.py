"""How long each stage of loading a model takes, and how much memory the processes hold after it.

python -m bench.load [--model PATH] [--backend NAME] [--runs N]

Each run starts two processes, like the server: one opens the file and makes the tokenizer, the
other makes the program and compiles it for the backend.  Figures are medians, without the time of
imports.  The first run is not counted: it brings the file into the page cache and the converted
tokenizer into llmsrv's cache.  Memory is that of the process at the end (PSS).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from bench.machine import describe
from bench.machine import pss_mb
from bench.reference import LIMITS
from llmsrv.backend.choose import run_on_backend
from llmsrv.config import DEFAULT_MODEL
from llmsrv.config import default_cache_dir
from llmsrv.files.open import open_model
from llmsrv.files.source import resolve_model
from llmsrv.model.load import load_model
from llmsrv.text.tokenizer import load_tokenizer

T = TypeVar("T")
FIGURES = {
    "server": ("open s", "tokenizer s", "server MB"),
    "engine": ("program s", "compile s", "engine MB"),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--stage", choices=FIGURES, help="only this process, as JSON")
    options = parser.parse_args()
    path = resolve_model(options.model, default_cache_dir(), sys.stderr)
    if options.stage:
        stages = {"server": load_in_server, "engine": load_in_engine}
        print(json.dumps(stages[options.stage](path, options.backend)))
        return
    print(f"{describe()}\n{path.name}, {size_mb(path):.0f} MB, medians of {options.runs} runs")
    for stage, names in FIGURES.items():
        runs = [run_in_process(stage, path, options.backend) for _ in range(options.runs + 1)]
        for name, values in zip(names, zip(*runs[1:])):
            print(f"{name:14}{statistics.median(values):10.3f}")


def run_in_process(stage: str, path: Path, backend: str) -> list[float]:
    """The values of FIGURES[stage], measured in a new process."""
    command = [sys.executable, "-m", "bench.load", "--stage", stage]
    command += ["--model", str(path), "--backend", backend]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout
    values: list[float] = json.loads(output)
    return values


def load_in_server(path: Path, _backend: str) -> list[float]:
    model, open_s = timed(lambda: open_model(path))
    tokenizer, tokenizer_s = timed(lambda: load_tokenizer(model, default_cache_dir()))
    return [open_s, tokenizer_s, pss_mb(os.getpid())]


def load_in_engine(path: Path, backend: str) -> list[float]:
    model, program_s = timed(lambda: load_model(path, lambda: None))
    _plan, compile_s = timed(
        lambda: run_on_backend(
            backend,
            {},
            default_cache_dir(),
            lambda backend: backend.compile(model.program, LIMITS, lambda: None),
        )
    )
    return [program_s, compile_s, pss_mb(os.getpid())]


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """The result of work(), and the seconds it took."""
    start_s = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start_s


def size_mb(path: Path) -> float:
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files) / 1e6


if __name__ == "__main__":
    main()
