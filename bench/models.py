"""What two models that are busy at once keep of the throughput that one has alone.

python -m bench.models [--streams 1,8] [--prompt 131] [--output 64] [--rounds 3] [-- server options]

The same file twice, so that both cost the same: one alone, the other alone, then both with as many
streams each, in turn, round by round.  1.00 says that together they make as many tokens a second as
one alone; that is so only on a machine that does nothing else, since two processes get more of a
busy one.  There the CPU time that a token takes, server and prompts included, says more.
"""

import argparse
import asyncio
import os
import statistics
import sys
from typing import NamedTuple

from bench.machine import cpu_s_below
from bench.machine import describe
from bench.serve import Load
from bench.serve import one_round
from bench.serve import our_server
from llmsrv.config import DEFAULT_MODEL


class Cost(NamedTuple):
    """Of an output token, in ms."""

    wall: float
    cpu: float


async def cost(loads: list[Load], num_streams: int, round: int) -> Cost:
    """With all loads at once."""
    before_s = cpu_s_below(os.getpid())
    results = await asyncio.gather(*(one_round(load, num_streams, round) for load in loads))
    cpu_s = cpu_s_below(os.getpid()) - before_s
    num_tokens = sum(r.num_tokens for r in results)
    return Cost(1e3 * max(r.wall_s for r in results) / num_tokens, 1e3 * cpu_s / num_tokens)


def main() -> None:
    own = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    parser = argparse.ArgumentParser()
    parser.add_argument("--streams", default="1,8")
    parser.add_argument("--prompt", type=int, default=131, help="words, about as many tokens")
    parser.add_argument("--output", type=int, default=64, help="tokens")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(own)
    print(describe())
    models = [f"--model={name}={DEFAULT_MODEL}" for name in "ab"]
    with our_server([*models, *sys.argv[len(own) + 2 :]]) as url:
        both = [Load(url, name, options.prompt, options.output) for name in "ab"]
        asyncio.run(cost(both, 1, -1))
        print(f"{'streams each':12}{'':6}{'one, ms':>10}{'both, ms':>10}{'kept':>6}")
        for num_streams in map(int, options.streams.split(",")):
            alone: list[Cost] = []
            together: list[Cost] = []
            for round in range(options.rounds):
                first, second = (asyncio.run(cost([b], num_streams, 2 * round)) for b in both)
                alone.append(Cost(*map(statistics.mean, zip(first, second))))
                together.append(asyncio.run(cost(both, num_streams, 2 * round + 1)))
            for name, ones, twos in zip(Cost._fields, zip(*alone), zip(*together)):
                kept = statistics.median(one / two for one, two in zip(ones, twos))
                figures = statistics.median(ones), statistics.median(twos), kept
                line = "{:10.2f}{:10.2f}{:6.2f}".format(*figures)
                print(f"{num_streams:12} {name:5}{line}", flush=True)


if __name__ == "__main__":
    main()
