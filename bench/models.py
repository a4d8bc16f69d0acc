"""What two models that are busy at once keep of the throughput that one has alone.

python -m bench.models [--streams 1,8] [--prompt 131] [--output 64] [--rounds 3] [-- server options]

The same file twice, so that both cost the same: one alone, the other alone, then both with as many
streams each, in turn, round by round.  1.00 says that together they make as many tokens a second as
one alone.  Only on a machine that does nothing else: two processes get more of a busy one.
"""

import argparse
import asyncio
import statistics
import sys

from bench.machine import describe
from bench.serve import Load
from bench.serve import one_round
from bench.serve import our_server
from llmsrv.config import DEFAULT_MODEL


async def rate(loads: list[Load], num_streams: int, round: int) -> float:
    """Output tokens a second, of all loads together."""
    results = await asyncio.gather(*(one_round(load, num_streams, round) for load in loads))
    return sum(r.num_tokens for r in results) / max(r.wall_s for r in results)


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
        asyncio.run(rate(both, 1, -1))
        print("streams each  one, tok/s  both, tok/s  kept")
        for num_streams in map(int, options.streams.split(",")):
            alone, together = [], []
            for round in range(options.rounds):
                each = [asyncio.run(rate([load], num_streams, 2 * round)) for load in both]
                alone.append(statistics.harmonic_mean(each))
                together.append(asyncio.run(rate(both, num_streams, 2 * round + 1)))
            kept = statistics.median(b / a for a, b in zip(alone, together, strict=True))
            one, two = statistics.median(alone), statistics.median(together)
            print(f"{num_streams:12} {one:11.1f} {two:12.1f} {kept:5.2f}", flush=True)


if __name__ == "__main__":
    main()
