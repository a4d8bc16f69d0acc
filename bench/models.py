"""How much of the throughput of one model two models keep when both are busy at once.

python -m bench.models [--streams 1,8] [--prompt 131] [--output 64] [--rounds 3] [-- server options]

Loads the same file twice, so that both models cost the same.  Each round measures one alone, the
other alone, and then both, each with the given number of streams.  "kept" is the cost of a token
alone, divided by its cost with both: at 1.00 both together produce as many tokens per second as one
alone.  Trust the wall time only on an idle machine: on a busy one two processes get a larger share
than one.  There the CPU time per token, of server, engine and prompts, is the better measure.
"""

import argparse
import asyncio
import os
import statistics
import sys
from typing import NamedTuple

from bench.machine import descendants_cpu_s
from bench.machine import describe
from bench.serve import Workload
from bench.serve import add_workload_options
from bench.serve import run_round
from bench.servers import run_llmsrv
from llmsrv.config import DEFAULT_MODEL


class Cost(NamedTuple):
    """Milliseconds per output token."""

    wall: float
    cpu: float


async def measure(workloads: list[Workload], num_streams: int, round_index: int) -> Cost:
    """All workloads at once."""
    before_s = descendants_cpu_s(os.getpid())
    rounds = (run_round(workload, num_streams, round_index) for workload in workloads)
    results = await asyncio.gather(*rounds)
    cpu_s = descendants_cpu_s(os.getpid()) - before_s
    num_tokens = sum(r.num_tokens for r in results)
    return Cost(1e3 * max(r.wall_s for r in results) / num_tokens, 1e3 * cpu_s / num_tokens)


def compare(
    workloads: list[Workload], num_streams: int, rounds: int
) -> tuple[list[Cost], list[Cost]]:
    """The costs in each round, first of one model alone, then of both together."""
    alone: list[Cost] = []
    together: list[Cost] = []
    for i in range(rounds):
        each = [asyncio.run(measure([workload], num_streams, 2 * i)) for workload in workloads]
        alone.append(Cost(*map(statistics.mean, zip(*each))))
        together.append(asyncio.run(measure(workloads, num_streams, 2 * i + 1)))
    return alone, together


def main() -> None:
    own = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    parser = argparse.ArgumentParser()
    add_workload_options(parser, rounds=3, streams="1,8")
    options = parser.parse_args(own)
    print(describe())
    models = [f"--model={name}={DEFAULT_MODEL}" for name in "ab"]
    with run_llmsrv([*models, *sys.argv[len(own) + 2 :]]) as url:
        workloads = [Workload(url, name, options.prompt, options.output) for name in "ab"]
        asyncio.run(measure(workloads, 1, -1))  # warm up
        print(f"{'streams each':12}{'':6}{'one, ms':>10}{'both, ms':>10}{'kept':>6}")
        for num_streams in map(int, options.streams.split(",")):
            alone, together = compare(workloads, num_streams, options.rounds)
            for name, ones, twos in zip(Cost._fields, zip(*alone), zip(*together)):
                kept = statistics.median(one / two for one, two in zip(ones, twos))
                one_ms, both_ms = statistics.median(ones), statistics.median(twos)
                columns = f"{one_ms:10.2f}{both_ms:10.2f}{kept:6.2f}"
                print(f"{num_streams:12} {name:5}{columns}", flush=True)


if __name__ == "__main__":
    main()
