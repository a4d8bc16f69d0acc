"""Checks and measures the CUDA backend in the ten minutes that a GPU may be at hand.

python -m bench.cuda [--out DIR] [--budget 560] [--only NAME,...] [--list] [--emulated]

Parts run one after the other, each in a process of its own with a time limit, so that a part that
fails, hangs or breaks the device leaves the others.  Their results are lines of JSON, kept in
DIR/results.json as they come, and all their output in DIR/log.txt (DIR is $OUT by default, else
here).  The table at the end compares the plan with PyTorch and with the device's own limits.
--emulated tries the script with a tiny model where there is no GPU, on the emulation of the tests;
its figures mean nothing.
"""

import argparse
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cuda_table import table
from bench.machine import describe

PYTHON = sys.executable
STREAMS, PROMPTS = "1,8,32,128", "1000,8000"
# The most telling first: time may end before the list does.
SHAPES = "Llama-3.1-8B", "Llama-3.2-1B", "SmolLM2-135M"
TYPES = "BF16", "Q4_K", "Q8_0"
MIN_S = 5.0  # not worth starting a part for less
SANITIZERS = "memcheck", "racecheck"
SANITIZER_FAILURE = 86  # exit code of compute-sanitizer when it has found errors


@dataclass(frozen=True)
class Part:
    """limit_s: the most that it may take"""

    name: str
    command: list[str]
    limit_s: float
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


def parts() -> Iterator[Part]:
    yield Part("machine", ["nvidia-smi"], 20)
    yield Part("limits", [PYTHON, "-m", "bench.cuda_peer", "limits"], 40)
    for dtype in ("bfloat16", "float16"):
        command = [PYTHON, "llmsrv.py", "selftest", "--backend", "cuda", "--dtype", dtype]
        yield Part(f"selftest-{dtype}", command, 90)
    for shape in SHAPES:
        for type in TYPES:
            command = [PYTHON, "-m", "bench.cuda_plan", shape, type, "--streams", STREAMS]
            yield Part(f"plan-{shape}-{type}", [*command, "--prompts", PROMPTS], 75)
        command = [PYTHON, "-m", "bench.cuda_peer", "speed", shape, "--streams", STREAMS]
        yield Part(f"peer-{shape}", [*command, "--prompts", PROMPTS], 90)
    for tool in SANITIZERS:
        yield _sanitizer(tool)


def emulated_parts() -> Iterator[Part]:
    """The same scripts, but nothing that needs PyTorch or NVIDIA's tools."""
    from tests.support.cuda import environment
    from tests.support.cuda import install_stand_in

    install_stand_in()

    emulation = {name: value for name, value in environment().items() if name not in os.environ}
    emulation |= {name: environment()[name] for name in ("PYTHONPATH", "LD_LIBRARY_PATH")}
    small = ["--streams", "1,3", "--prompts", "40", "--seconds", "0.2", "--context", "64"]
    for type in ("BF16", "Q8_0", "Q4_K"):
        command = [PYTHON, "-m", "bench.cuda_plan", "tiny", type, *small, "--max-rows", "32"]
        yield Part(f"plan-tiny-{type}", command, 300, emulation)
    command = [PYTHON, "-m", "bench.cuda_sanitized"]
    yield Part("sanitized-model", command, 300, emulation)


def _sanitizer(tool: str) -> Part:
    """A tiny model under a tool that finds what the emulation may have missed."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(SANITIZER_FAILURE)]
    return Part(tool, [*command, PYTHON, "-m", "bench.cuda_sanitized"], 120)


class Run:
    """Runs parts and keeps what they print.

    results  the lines of JSON; outcomes  name of a part -> how it ended
    """

    def __init__(self, folder: Path, budget_s: float) -> None:
        self.results: list[dict[str, Any]] = []
        self.outcomes: dict[str, str] = {}
        self._machine = describe()
        self._folder = folder
        self._end_s = time.monotonic() + budget_s
        self._log = (folder / "log.txt").open("w", buffering=1)

    def run(self, part: Part) -> None:
        left_s = self._end_s - time.monotonic()
        if left_s < MIN_S:
            self._finish(part, "not run: no time left")
        elif shutil.which(part.command[0]) is None:
            self._finish(part, f"not run: there is no {part.command[0]}")
        else:
            self._start(part, min(part.limit_s, left_s))

    def _start(self, part: Part, limit_s: float) -> None:
        self.say(f"\n== {part.name}, at most {limit_s:.0f} s")
        start_s = time.monotonic()
        process = subprocess.Popen(
            part.command,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | part.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        is_late = threading.Event()

        def stop() -> None:
            is_late.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(limit_s, stop)
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            self._take(line.rstrip())
        code = process.wait()
        timer.cancel()
        ended = "stopped" if is_late.is_set() else "ended well" if code == 0 else f"FAILED ({code})"
        self._finish(part, f"{ended} after {time.monotonic() - start_s:.0f} s")

    def _take(self, line: str) -> None:
        self.say(line)
        if line.startswith('{"'):
            try:
                self.results.append(json.loads(line))
            except ValueError:
                return
            self._save()

    def _finish(self, part: Part, outcome: str) -> None:
        self.outcomes[part.name] = outcome
        self.say(f"== {part.name}: {outcome}")
        self._save()

    def _save(self) -> None:
        content = {
            "machine": self._machine,
            "outcomes": self.outcomes,
            "results": self.results,
        }
        (self._folder / "results.json").write_text(json.dumps(content, indent=1))

    def say(self, line: str) -> None:
        print(line, flush=True)
        self._log.write(line + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--budget", type=float, default=560, help="seconds for all parts together")
    parser.add_argument("--only", default="", help="parts whose name contains one of these")
    parser.add_argument("--list", action="store_true", help="print the parts and end")
    parser.add_argument("--emulated", action="store_true")
    options = parser.parse_args()
    chosen = list(emulated_parts() if options.emulated else parts())
    if options.only:
        words = options.only.split(",")
        chosen = [part for part in chosen if any(word in part.name for word in words)]
    if options.list:
        for part in chosen:
            print(f"{part.name:28}{part.limit_s:4.0f} s  {' '.join(part.command)}")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    run = Run(options.out, options.budget)
    run.say(describe())
    for part in chosen:
        run.run(part)
    run.say("")
    for name, outcome in run.outcomes.items():
        run.say(f"{name:28}{outcome}")
    for line in table(run.results):
        run.say(line)


if __name__ == "__main__":
    main()
