"""The same load on several servers, which take turns within each round, so that a slow minute of
the machine slows them all.

python -m bench.compare [NAME=URL[#MODEL] ...] [--start NAME=COMMAND ...] [--built NAME=TEXT ...]
                        [--streams 1,4,8,16,32] [--prompt 131] [--output 64] [--rounds 5]
                        [--json PATH] [--plot PATH]

Requests are those of bench.serve.  Figures are medians over the rounds.  A server's ratio is the
median, over the rounds, of its tokens per second divided by those of the first server.  Servers
with a URL come first, then those of --start, each in the order of the command line.
"""

import argparse
import asyncio
import contextlib
import statistics
from collections.abc import Iterable
from typing import Any

from bench.machine import describe
from bench.results import add_options
from bench.results import write_results
from bench.serve import Workload
from bench.serve import add_workload_options
from bench.serve import run_round
from bench.serve import summarize
from bench.servers import first_model
from bench.servers import run_command

Summary = dict[str, float]

HEADINGS = "output tok/s", "first token, ms", "inter-token p50, ms", "p99, ms", "ratio"


def measure(
    workloads: dict[str, Workload], num_streams: int, rounds: int
) -> dict[str, list[Summary]]:
    """The rounds of each server.  The server that goes first changes from round to round."""
    summaries: dict[str, list[Summary]] = {name: [] for name in workloads}
    names = list(workloads)
    for i in range(rounds):
        for j in range(len(names)):
            name = names[(i + j) % len(names)]
            result = asyncio.run(run_round(workloads[name], num_streams, i))
            summaries[name].append(summarize([result]))
    return summaries


def make_rows(num_streams: int, summaries: dict[str, list[Summary]]) -> list[dict[str, Any]]:
    """One row for each server."""
    rates = {name: [each["output tok/s"] for each in rounds] for name, rounds in summaries.items()}
    first_rates = next(iter(rates.values()))
    return [
        {
            "server": name,
            "streams": num_streams,
            **{key: statistics.median(each[key] for each in rounds) for key in rounds[0]},
            "ratio": statistics.median(a / b for a, b in zip(rates[name], first_rates)),
            "rounds": rounds,
        }
        for name, rounds in summaries.items()
    ]


def main() -> None:
    options = parse()
    built = dict(options.built)
    print(describe())
    for name, text in built.items():
        print(f"{name}: {text}")
    with contextlib.ExitStack() as started:
        addresses = {name: address.partition("#")[::2] for name, address in options.servers}
        for name, command in options.start:
            url = started.enter_context(run_command(command))
            addresses[name] = url, first_model(url)
        workloads = {
            name: Workload(url, model or name, options.prompt, options.output)
            for name, (url, model) in addresses.items()
        }
        rows = run(workloads, map(int, options.streams.split(",")), options.rounds)
    write_results(options, rows, built)


def run(
    workloads: dict[str, Workload], stream_counts: Iterable[int], rounds: int
) -> list[dict[str, Any]]:
    """Measures all servers, prints the rows and returns them."""
    for workload in workloads.values():
        asyncio.run(run_round(workload, 1, -1))  # warm up
    rows: list[dict[str, Any]] = []
    print(f"{'server':16}streams", *HEADINGS, sep="  ")
    for num_streams in stream_counts:
        for row in make_rows(num_streams, measure(workloads, num_streams, rounds)):
            rows.append(row)
            server, streams, rate, first, p50, p99, ratio = list(row.values())[:7]
            print(
                f"{server:16}{streams:7}{rate:14.1f}{first:17.1f}{p50:21.2f}{p99:9.1f}{ratio:7.2f}",
                flush=True,
            )
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("servers", nargs="*", type=named, metavar="NAME=URL[#MODEL]")
    parser.add_argument(
        "--start",
        action="append",
        default=[],
        type=named,
        metavar="NAME=COMMAND",
        help="start a server, with {port} replaced by a free port, and stop it at the end; "
        "its model is the first in its /v1/models",
    )
    parser.add_argument(
        "--built",
        action="append",
        default=[],
        type=named,
        metavar="NAME=TEXT",
        help="how the server was built, for the header, --json and the legend of --plot",
    )
    add_workload_options(parser, rounds=5)
    add_options(parser)
    options = parser.parse_args()
    names = [name for name, _ in options.servers + options.start]
    if not names or len(names) != len(set(names)):
        parser.error("give at least one server, each with a name of its own")
    if unknown := {name for name, _ in options.built} - set(names):
        parser.error(f"--built names no server: {', '.join(sorted(unknown))}")
    return options


def named(argument: str) -> tuple[str, str]:
    """The two halves of NAME=VALUE."""
    name, _, value = argument.partition("=")
    if not name or not value:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {argument!r}")
    return name, value


if __name__ == "__main__":
    main()
