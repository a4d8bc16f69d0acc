"""Runs a tiny model on the CUDA backend, for compute-sanitizer to watch.

python -m bench.cuda_sanitized [--backend cuda]

A prompt in two steps, decode steps with graphs, drafts, and sampling with every parameter, for a
type of each kind of format, in float16 and bfloat16.
"""

import argparse

import numpy as np

from bench.reference import batch
from llmsrv.backend.base import Limits
from llmsrv.backend.choose import run_on_backend
from llmsrv.backend.sampling.table import SamplingParameters
from llmsrv.config import default_cache_dir
from llmsrv.selftest.made_models import Shape
from llmsrv.selftest.made_models import make_program

SHAPE = Shape("sanitized", 2, 256, 512, 4, 2, 64, 1024, is_tied=False, weight_size=0.1)
LIMITS = Limits(max_rows=160, max_logit_rows=12, max_slots=12, num_blocks=64)
TYPES = "BF16", "Q8_0", "Q4_K", "Q6_K"
SAMPLING = SamplingParameters(
    seed=1,
    temperature=0.8,
    top_k=200,
    top_p=0.9,
    min_p=0.01,
    typical_p=0.9,
    repetition_penalty=1.2,
    presence_penalty=0.5,
    num_logprobs=5,
)


def run(backend_name: str, dtype: str, type: str) -> None:
    options = {"cuda": {"dtype": dtype, "warms_up": False}}
    backend, _, _ = run_on_backend(
        backend_name, options, default_cache_dir(), lambda backend: None
    )
    plan = backend.compile(make_program(SHAPE, type), LIMITS, lambda: None)
    for slot in range(LIMITS.max_slots):
        plan.sampling.set(slot, SAMPLING, [1, 2, 3], [4, 5])
    for start in (0, 150):
        plan.forward(batch(1, range(start, start + 150), 300))
    plan.sample(np.zeros(1, np.int32), np.zeros(1, np.int64))
    for step in range(3):  # the second captures a graph and the third replays it
        for num_streams in (1, 3, 12):
            plan.forward(batch(num_streams, range(30 + step, 31 + step), 64))
            slots = np.arange(num_streams, dtype=np.int32)
            plan.sample(slots, np.full(num_streams, step, np.int64))
    print(f"{type} in {dtype}: done", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", default="cuda")
    options = parser.parse_args()
    for dtype in ("float16", "bfloat16"):
        for type in TYPES:
            run(options.backend, dtype, type)


if __name__ == "__main__":
    main()
