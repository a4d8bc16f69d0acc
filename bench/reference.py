"""Speed of the reference backend on the default model, with one BLAS thread and with one per core.

python -m bench.reference [RUNS]

Every run is a new process.  Runs with different numbers of threads take turns, so that a busy
minute slows them all.  Figures are medians: seconds from the cached file to a plan, rows/s of
prefill in chunks of 512, tokens/s of greedy decoding of 1 and of 8 sequences with 64 to 128 tokens
of context, and the resident memory at the end.
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
            results[count].append(run_in_process(count))
    print(f"{'BLAS threads':14}" + "".join(f"{name:>20}" for name in FIGURES))
    for count in threads:
        medians = map(statistics.median, zip(*results[count]))
        print(f"{count:<14}" + "".join(f"{median:20.1f}" for median in medians))


def run_in_process(threads: int) -> list[float]:
    """The values of FIGURES, measured in a new process."""
    environment = os.environ | {"OPENBLAS_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "bench.reference", "--once"]
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout
    values: list[float] = json.loads(output)
    return values


def measure() -> list[float]:
    path = resolve_model(DEFAULT_MODEL, default_cache_dir(), sys.stderr)
    start_s = time.perf_counter()
    program = load_model(path, lambda: None).program
    plan = ReferenceBackend().compile(program, LIMITS, lambda: None)
    load_s = time.perf_counter() - start_s
    decode(plan, 1, 4)  # touches memory and starts threads
    one_stream = OUTPUT_TOKENS / decode(plan, 1, OUTPUT_TOKENS)
    eight_streams = 8 * OUTPUT_TOKENS / decode(plan, 8, OUTPUT_TOKENS)
    return [load_s, prefill(plan), one_stream, eight_streams, pss_mb(os.getpid())]


def prefill(plan: Plan) -> float:
    """Rows/s for a prompt of 1,024 tokens in two chunks."""
    start_s = time.perf_counter()
    for start in (0, 512):
        plan.forward(batch(1, range(start, start + 512), 1024))
    return 1024 / (time.perf_counter() - start_s)


def decode(plan: Plan, num_sequences: int, num_tokens: int) -> float:
    """Seconds to generate num_tokens for each sequence, its prompt not counted."""
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
    """The same positions of every sequence; each sequence has its own blocks.

    length  tokens that a sequence will have at most
    Token ids are arbitrary, except that a single row takes the id that the last step sampled.
    """
    num_blocks = -(-length // BLOCK_SIZE)
    tables = 1 + np.arange(num_sequences * num_blocks, dtype=np.int32).reshape(-1, num_blocks)
    sequences = np.arange(num_sequences).repeat(len(positions))
    row_positions = np.tile(np.array(positions), num_sequences)
    is_decode = len(positions) == 1
    return Batch(
        ids=(-1 - sequences if is_decode else 100 + row_positions % 1000).astype(np.int32),
        positions=row_positions.astype(np.int32),
        sequences=sequences.astype(np.int32),
        slot_mapping=tables[sequences, row_positions // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE
        + row_positions % BLOCK_SIZE,
        block_tables=tables,
        is_long=np.zeros(num_sequences, np.bool_),
        logit_rows=np.arange(1, num_sequences + 1, dtype=np.int32) * len(positions) - 1,
    )


if __name__ == "__main__":
    main()
