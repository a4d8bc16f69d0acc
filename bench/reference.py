"""How fast the reference backend is on the default model, with one BLAS thread and with more.

python -m bench.reference [RUNS]

Every run is a process of its own, and runs with different numbers of threads take turns, so that a
busy machine is busy for all of them.  Figures are medians: seconds from the cached file to a plan,
rows/s of prompts in chunks of 512, tokens/s of greedy decoding for 1 and for 8 sequences at 64 to
128 tokens of context, and the resident memory after all that.
"""

import json
import os
import statistics
import subprocess
import sys
import time

import numpy as np

from bench.machine import describe
from bench.machine import pss_mb
from llmsrv.backend.base import BLOCK_SIZE
from llmsrv.backend.base import Batch
from llmsrv.backend.base import Limits
from llmsrv.backend.base import Plan
from llmsrv.backend.reference.backend import ReferenceBackend
from llmsrv.backend.sampling.table import SamplingParameters
from llmsrv.config import DEFAULT_MODEL
from llmsrv.config import default_cache_dir
from llmsrv.files.source import resolve_model
from llmsrv.model.load import load_model

LIMITS = Limits(max_rows=512, max_logit_rows=32, max_slots=32, num_blocks=1025)
PROMPT_TOKENS, OUTPUT_TOKENS = 64, 64
FIGURES = ("load s", "prefill rows/s", "1 stream tokens/s", "8 streams tokens/s", "memory MB")


def main() -> None:
    if sys.argv[1:] == ["--once"]:
        print(json.dumps(measure()))
        return
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    print(describe(), flush=True)
    threads = sorted({1, os.cpu_count() or 1})
    results: dict[int, list[list[float]]] = {count: [] for count in threads}
    for _ in range(runs):
        for count in threads:
            results[count].append(in_a_process(count))
    print(f"{'BLAS threads':14}" + "".join(f"{name:>20}" for name in FIGURES))
    for count in threads:
        medians = map(statistics.median, zip(*results[count]))
        print(f"{count:<14}" + "".join(f"{median:20.1f}" for median in medians))


def in_a_process(threads: int) -> list[float]:
    environment = os.environ | {"OPENBLAS_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "bench.reference", "--once"]
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout
    figures: list[float] = json.loads(output)
    return figures


def measure() -> list[float]:
    path = resolve_model(DEFAULT_MODEL, default_cache_dir(), sys.stderr)
    start_s = time.perf_counter()
    program = load_model(path, lambda: None).program
    plan = ReferenceBackend().compile(program, LIMITS, lambda: None)
    load_s = time.perf_counter() - start_s
    decode(plan, 1, 4)  # the first pages and threads
    alone = OUTPUT_TOKENS / decode(plan, 1, OUTPUT_TOKENS)
    together = 8 * OUTPUT_TOKENS / decode(plan, 8, OUTPUT_TOKENS)
    return [load_s, prefill(plan), alone, together, pss_mb(os.getpid())]


def prefill(plan: Plan) -> float:
    """Rows/s of a prompt of 1,024 tokens in two chunks."""
    start_s = time.perf_counter()
    for start in (0, 512):
        plan.forward(batch(1, range(start, start + 512), 1024))
    return 1024 / (time.perf_counter() - start_s)


def decode(plan: Plan, num_sequences: int, num_tokens: int) -> float:
    """Seconds for num_tokens of each sequence, after its prompt."""
    length = PROMPT_TOKENS + num_tokens
    slots = np.arange(num_sequences, dtype=np.int32)
    for slot in slots.tolist():
        plan.sampling.set(slot, SamplingParameters(temperature=0))
    plan.forward(batch(num_sequences, range(PROMPT_TOKENS), length))
    start_s = time.perf_counter()
    for step in range(num_tokens):
        plan.sample(slots, np.full(num_sequences, step))
        position = PROMPT_TOKENS + step
        plan.forward(batch(num_sequences, range(position, position + 1), length))
    return time.perf_counter() - start_s


def batch(num_sequences: int, positions: range, length: int) -> Batch:
    """The same positions of every sequence, each in blocks of its own; ids do not matter here,
    except that a single row goes on from what was sampled."""
    num_blocks = -(-length // BLOCK_SIZE)
    tables = 1 + np.arange(num_sequences * num_blocks, dtype=np.int32).reshape(-1, num_blocks)
    sequences = np.arange(num_sequences).repeat(len(positions))
    of_rows = np.tile(np.array(positions), num_sequences)
    decodes = len(positions) == 1
    return Batch(
        ids=-1 - sequences.astype(np.int32) if decodes else (100 + of_rows % 1000).astype(np.int32),
        positions=of_rows.astype(np.int32),
        sequences=sequences.astype(np.int32),
        slot_mapping=tables[sequences, of_rows // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE
        + of_rows % BLOCK_SIZE,
        block_tables=tables,
        is_long=np.zeros(num_sequences, np.bool_),
        logit_rows=np.arange(1, num_sequences + 1, dtype=np.int32) * len(positions) - 1,
    )


if __name__ == "__main__":
    main()
