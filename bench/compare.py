"""The same load on several servers, in turn within every round: a slow minute hits them all.

python -m bench.compare NAME=URL[#MODEL] ... [--streams 1,4,8,16,32] [--prompt 131] [--output 64]
                        [--rounds 5] [--json PATH] [--plot PATH]

Requests are those of bench.serve.  Figures are medians over the rounds; ratios are medians of the
ratios to the first server within each round.
"""

import argparse
import asyncio
import statistics
from typing import Any

from bench.machine import describe
from bench.results import add_options
from bench.results import write
from bench.serve import Load
from bench.serve import figures
from bench.serve import one_round

Figures = dict[str, float]


def measure(loads: dict[str, Load], num_streams: int, rounds: int) -> dict[str, list[Figures]]:
    """Each server's rounds; who comes first changes from round to round."""
    found: dict[str, list[Figures]] = {name: [] for name in loads}
    names = list(loads)
    for round in range(rounds):
        for i in range(len(names)):
            name = names[(round + i) % len(names)]
            found[name].append(figures([asyncio.run(one_round(loads[name], num_streams, round))]))
    return found


def report(num_streams: int, found: dict[str, list[Figures]]) -> list[dict[str, Any]]:
    """One row a server."""
    rates = {name: [each["output tok/s"] for each in rounds] for name, rounds in found.items()}
    first = next(iter(rates.values()))
    return [
        {
            "server": name,
            "streams": num_streams,
            **{key: statistics.median(each[key] for each in rounds) for key in rounds[0]},
            "ratio": statistics.median(ours / theirs for ours, theirs in zip(rates[name], first)),
            "rounds": rounds,
        }
        for name, rounds in found.items()
    ]


def load_of(server: str, num_prompt_words: int, num_output_tokens: int) -> tuple[str, Load]:
    name, _, address = server.partition("=")
    url, _, model = address.partition("#")
    return name, Load(url, model or name, num_prompt_words, num_output_tokens)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("servers", nargs="+", metavar="NAME=URL[#MODEL]")
    parser.add_argument("--streams", default="1,4,8,16,32")
    parser.add_argument("--prompt", type=int, default=131, help="words, about as many tokens")
    parser.add_argument("--output", type=int, default=64, help="tokens")
    parser.add_argument("--rounds", type=int, default=5)
    add_options(parser)
    options = parser.parse_args()
    loads = dict(load_of(server, options.prompt, options.output) for server in options.servers)
    print(describe())
    for load in loads.values():
        asyncio.run(one_round(load, 1, -1))  # whatever is slow once
    rows: list[dict[str, Any]] = []
    print(f"{'server':16}streams  output tok/s  first token, ms  between, p50 ms  p99 ms   ratio")
    for num_streams in map(int, options.streams.split(",")):
        for row in report(num_streams, measure(loads, num_streams, options.rounds)):
            rows.append(row)
            server, streams, rate, first, p50, p99, ratio = list(row.values())[:7]
            print(
                f"{server:16}{streams:7}{rate:14.1f}{first:17.1f}{p50:17.2f}{p99:8.1f}{ratio:8.2f}",
                flush=True,
            )
    write(options, rows)


if __name__ == "__main__":
    main()
