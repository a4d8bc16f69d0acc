"""How much of a decode step is spent outside the C library: Python, arrays and messages.

python -m bench.step [--steps N] [--threads N] [--model PATH]

Steps the engine as its process does, sending of the messages included, for 1, 8 and 32 streams
that sample greedily, with top_p, or with penalties and log-probabilities.  Times are CPU times of
the engine's own thread, so that other processes do not count: of a whole step, of its part outside
calls to the C library, and of the sampling call.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.machine import describe
from llmsrv.backend.base import Limits
from llmsrv.backend.cpu.backend import CPUBackend
from llmsrv.backend.cpu.backend import CPUOptions
from llmsrv.config import DEFAULT_MODEL
from llmsrv.config import default_cache_dir
from llmsrv.engine.core import EngineCore
from llmsrv.engine.messages import Abort
from llmsrv.engine.messages import Sampling
from llmsrv.engine.messages import Submit
from llmsrv.engine.queues import Sender
from llmsrv.files.source import resolve_model
from llmsrv.model.load import load_model

LIMITS = Limits(max_rows=512, max_logit_rows=64, max_slots=32, num_blocks=1025)
CONTEXT_LENGTH = 2048
PROMPT_TOKENS = 131
MAX_TOKENS = 350  # never reached, although some streams decode while other prompts are computed
PIPE_BYTES = 1 << 16

SAMPLINGS = {
    "greedy": Sampling(seed=1, temperature=0.0),
    "top_p 0.95": Sampling(seed=1, top_p=0.95),
    "penalties, 5 logprobs": Sampling(
        seed=1, top_k=50, top_p=0.95, presence_penalty=0.5, num_logprobs=5
    ),
}


class Timed:
    """Wraps a function and adds up the CPU time of the calling thread in its calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.seconds = 0.0

    def __call__(self, *arguments: Any) -> Any:
        start_s = time.thread_time()
        result = self._function(*arguments)
        self.seconds += time.thread_time() - start_s
        return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--model", type=Path)
    arguments = parser.parse_args()
    path = arguments.model or resolve_model(DEFAULT_MODEL, default_cache_dir(), sys.stderr)
    backend = CPUBackend(CPUOptions(default_cache_dir(), arguments.threads))
    library: Any = backend._library
    forward, sample = Timed(library.llmsrv_forward), Timed(library.llmsrv_sample)
    library.llmsrv_forward, library.llmsrv_sample = forward, sample
    program = load_model(path, lambda: None).program
    core = EngineCore(
        backend.compile(program, LIMITS, lambda: None), LIMITS, CONTEXT_LENGTH, program.vocab_size
    )
    print(describe())
    print(f"{backend.tier.name}, {backend.num_threads} threads, {arguments.steps} steps")
    print(f"{'':36}{'step, ms':>10}{'outside C':>12}{'us':>8}{'sampling, us':>14}")
    for name, sampling in SAMPLINGS.items():
        for num_streams in (1, 8, 32):
            total_s = measure(core, sampling, num_streams, arguments.steps, (forward, sample))
            outside_s = total_s - forward.seconds - sample.seconds
            print(
                f"{name + ', streams':32}{num_streams:4}{total_s / arguments.steps * 1e3:10.2f}"
                f"{outside_s / total_s:12.1%}{outside_s / arguments.steps * 1e6:8.0f}"
                f"{sample.seconds / arguments.steps * 1e6:14.0f}"
            )


def measure(
    core: EngineCore, sampling: Sampling, num_streams: int, num_steps: int, calls: tuple[Timed, ...]
) -> float:
    """Seconds of num_steps decode steps; `calls` then hold their own times in these steps."""
    read_fd, write_fd = os.pipe()
    sender = Sender(write_fd, 0)
    for stream in range(num_streams):
        prompt = [504 + stream] * PROMPT_TOKENS
        core.submit(Submit(stream, prompt, MAX_TOKENS, [], sampling))
    while len(core.step().tokens) < num_streams:
        pass
    total_s = 0.0
    for call in calls:
        call.seconds = 0.0
    for _ in range(num_steps):
        start_s = time.thread_time()
        sender.send(core.step())
        total_s += time.thread_time() - start_s
        os.read(read_fd, PIPE_BYTES)
    for stream in range(num_streams):
        core.abort(Abort(stream))
    core.step()
    os.close(read_fd)
    os.close(write_fd)
    return total_s


if __name__ == "__main__":
    main()
