"""Decode and prefill of one model on a backend's plan, with random weights made on the spot.

python -m bench.cuda_plan SHAPE TYPE [--streams 1,8,32,128] [--prompts 1000,8000] [--backend cuda]
                          [--dtype bfloat16] [--seconds 1.5]

Decode runs the plan as the engine does: the next step is enqueued before this one's ids are read.
"engine" is the same through the engine core, so that the difference is its scheduling and messages.
Each result is one line of JSON; rates are tokens per second of all streams together.
"""

import argparse
import json
import statistics
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from bench.reference import batch
from bench.shapes import SHAPES
from llmsrv.backend.base import BLOCK_SIZE
from llmsrv.backend.base import Backend
from llmsrv.backend.base import Limits
from llmsrv.backend.base import PendingSamples
from llmsrv.backend.base import Plan
from llmsrv.backend.choose import run_on_backend
from llmsrv.backend.program import Linear
from llmsrv.backend.program import Program
from llmsrv.backend.sampling.table import SamplingParameters
from llmsrv.config import default_cache_dir
from llmsrv.engine.core import EngineCore
from llmsrv.engine.messages import Sampling
from llmsrv.engine.messages import Submit
from llmsrv.selftest.made_models import Shape
from llmsrv.selftest.made_models import make_program

CONTEXT_TOKENS = 1024  # in the cache before the first decode step
MAX_STEPS = 256  # that a decode measurement may run
WARM_UP_STEPS = 4
ENGINE_STREAMS = 32
SAMPLINGS = {
    "greedy": SamplingParameters(temperature=0),
    "top_p": SamplingParameters(temperature=0.8, top_p=0.95),
}


class Bench:
    """A compiled model.

    context  tokens of each stream in the KV cache before it decodes
    """

    def __init__(self, backend: Backend, shape: Shape, type: str, options: Any) -> None:
        self.backend, self.shape, self.type = backend, shape, type
        self.seconds: float = options.seconds
        self.streams, self.prompts = _numbers(options.streams), _numbers(options.prompts)
        self.context: int = min(CONTEXT_TOKENS, options.context)
        self.program = make_program(shape, type)
        start_s = time.perf_counter()
        self.limits = self._limits(options.max_rows)
        self.plan: Plan = backend.compile(self.program, self.limits, lambda: None)
        self._report("load", seconds=time.perf_counter() - start_s)

    def _limits(self, max_rows: int) -> Limits:
        most_streams = max([1, *self.streams])
        blocks_a_stream = -(-(self.context + MAX_STEPS) // BLOCK_SIZE)
        prompt_blocks = -(-max([1, *self.prompts]) // BLOCK_SIZE)
        num_blocks = 1 + max(most_streams * blocks_a_stream, prompt_blocks)
        return Limits(max(max_rows, most_streams), most_streams, most_streams, num_blocks)

    def run(self) -> None:
        self._fill_cache()
        for num_streams in self.streams:
            for name in SAMPLINGS if num_streams == ENGINE_STREAMS else ["greedy"]:
                rate = self._decode(num_streams, name)
                num_bytes = self._step_bytes(num_streams)
                self._report(
                    "decode", streams=num_streams, mode=name, rate=rate, step_bytes=num_bytes
                )
        for length in self.prompts:
            rate = length / self._prefill(length)
            self._report("prefill", tokens=length, rate=rate, flops=self._flops(length))
        if ENGINE_STREAMS in self.streams:
            rate = self._engine(ENGINE_STREAMS)
            self._report("decode", streams=ENGINE_STREAMS, mode="engine", rate=rate)

    def _report(self, part: str, **values: Any) -> None:
        backend = f"llmsrv {self.backend.name}"
        names = {"backend": backend, "part": part, "shape": self.shape.name, "type": self.type}
        print(json.dumps(names | values), flush=True)

    # ---- What is measured

    def _fill_cache(self) -> None:
        """Every block holds the keys and values of one block of a prompt; zeros would be easier for
        a device than real values."""
        self.plan.forward(batch(1, range(BLOCK_SIZE), BLOCK_SIZE))
        for block in range(2, self.limits.num_blocks):
            self.plan.copy_block(1, block)

    def _decode(self, num_streams: int, sampling: str) -> float:
        slots = np.arange(num_streams, dtype=np.int32)
        for slot in slots.tolist():
            self.plan.sampling.set(slot, replace(SAMPLINGS[sampling], seed=slot))
        steps = self._steps(num_streams)
        for _ in range(WARM_UP_STEPS):
            next(steps)
        start_s, num_steps = time.perf_counter(), 0
        for _ in steps:
            num_steps += 1
            if time.perf_counter() - start_s > self.seconds:
                break
        took_s = time.perf_counter() - start_s
        steps.close()
        return num_steps * num_streams / took_s

    def _steps(self, num_streams: int) -> Iterator[None]:
        """Each yields when it has been enqueued and the one before has been read."""
        slots = np.arange(num_streams, dtype=np.int32)
        pending: deque[PendingSamples] = deque()
        try:
            for step in range(MAX_STEPS):
                position = self.context + step
                rows = batch(num_streams, range(position, position + 1), self.context + MAX_STEPS)
                if step == 0:  # no step before it has sampled
                    rows = replace(rows, ids=slots)
                self.plan.forward(rows)
                positions = np.full(num_streams, step, np.int64)
                pending.append(self.plan.enqueue_sample(slots, positions))
                if len(pending) == 2:
                    pending.popleft().read()
                yield
        finally:
            for samples in pending:
                samples.read()

    def _prefill(self, length: int) -> float:
        """Seconds from a prompt to its first token, in chunks of max_rows."""
        self.plan.sampling.set(0, SAMPLINGS["greedy"])
        found = []
        chunk = self.limits.max_rows
        while len(found) < 4 and sum(found) < 2 * self.seconds:
            start_s = time.perf_counter()
            for start in range(0, length, chunk):
                self.plan.forward(batch(1, range(start, min(start + chunk, length)), length))
            self.plan.sample(np.zeros(1, np.int32), np.zeros(1, np.int64))
            found.append(time.perf_counter() - start_s)
        return statistics.median(found[1:] or found)

    def _engine(self, num_streams: int) -> float:
        """Decode through the engine core; other prompts for each stream, so nothing is shared."""
        context_length = self.context + MAX_STEPS
        core = EngineCore(self.plan, self.limits, context_length, self.program.vocab_size)
        rng = np.random.default_rng(0)
        for stream in range(num_streams):
            prompt = rng.integers(0, self.program.vocab_size, self.context - 1).tolist()
            core.submit(Submit(stream, prompt, MAX_STEPS, [], Sampling(seed=0, temperature=0.0)))
        while len(core.step().tokens) < num_streams:
            pass
        start_s, num_tokens = time.perf_counter(), 0
        while core.has_work and time.perf_counter() - start_s < self.seconds:
            num_tokens += sum(len(tokens.ids) for tokens in core.step().tokens)
        return num_tokens / (time.perf_counter() - start_s)

    # ---- What the device must do at least

    def _step_bytes(self, num_streams: int) -> int:
        """That a decode step reads: all weights of products, keys and values."""
        kv_bytes = self.backend.kv_position_bytes(self.program)
        return _weight_bytes(self.program) + num_streams * self.context * kv_bytes

    def _flops(self, length: int) -> int:
        """Of a prompt: products with weights, those of the logits for one row, and attention."""
        weights = sum(w.shape[0] * w.shape[1] for w in _weights(self.program))
        logits = self.program.vocab_size * self.shape.hidden_size
        attention = self.shape.num_layers * self.shape.num_heads * self.shape.head_dim
        return 2 * ((weights - logits) * length + logits + attention * length * length)


def _weights(program: Program) -> list[Any]:
    return [
        weight
        for operation in program.operations
        if isinstance(operation, Linear)
        for weight in operation.weights
    ]


def _weight_bytes(program: Program) -> int:
    return sum(weight.data.nbytes for weight in _weights(program))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in filter(None, text.split(","))]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("type", help="of the weights: BF16, Q8_0, Q4_K, ...")
    parser.add_argument("--streams", default="1,8,32,128")
    parser.add_argument("--prompts", default="1000,8000")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--seconds", type=float, default=1.5, help="of each measurement")
    parser.add_argument("--context", type=int, default=CONTEXT_TOKENS)
    parser.add_argument("--max-rows", type=int, default=2048, help="of a step")
    options = parser.parse_args()
    own = {"cuda": {"dtype": options.dtype}}
    backend, _, _ = run_on_backend(
        options.backend, own, default_cache_dir(), lambda backend: None
    )
    Bench(backend, SHAPES[options.shape], options.type, options).run()


if __name__ == "__main__":
    main()
