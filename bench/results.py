"""What bench.serve and bench.compare find, as JSON and as a plot over the number of streams.

python -m bench.results RESULTS.json ... --plot PATH
"""

import argparse
import json
from pathlib import Path
from typing import Any

from bench.machine import describe

Rows = list[dict[str, Any]]

FIGURES = "output tok/s", "first token, ms", "between, p50 ms", "between, p99 ms"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="PNG, SVG or PDF by its ending")


def write(options: argparse.Namespace, rows: Rows) -> None:
    if options.json:
        options.json.write_text(json.dumps({"machine": describe(), "results": rows}, indent=1))
    if options.plot:
        draw(options.plot, rows)


def draw(path: Path, rows: Rows) -> None:
    """One panel a figure, in each one line a server."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(FIGURES), 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(FIGURES)), FIGURES, strict=True):
        for server in dict.fromkeys(row["server"] for row in rows):
            own = [row for row in rows if row["server"] == server]
            streams = [str(row["streams"]) for row in own]
            axes.plot(streams, [row[name] for row in own], marker="o", label=server)
        axes.set(title=name, xlabel="streams")
        axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--plot", type=Path, required=True)
    options = parser.parse_args()
    contents = [json.loads(path.read_text()) for path in options.files]
    draw(options.plot, [row for content in contents for row in content["results"]])


if __name__ == "__main__":
    main()
