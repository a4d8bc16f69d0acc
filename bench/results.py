"""Results of bench.serve and bench.compare: writes them as JSON and plots them.

python -m bench.results RESULTS.json ... --plot PATH
"""

import argparse
import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from bench.machine import describe

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]

# Title, key in a row, and scale of the y axis.
PANELS = (
    ("Output tokens per second", "output tok/s", "linear"),
    ("Time to first token, ms", "first token, ms", "log"),
    ("Time between tokens, p99, ms", "inter-token p99, ms", "log"),
)

# One picture with a transparent background serves light and dark pages: on white and on #0d1117,
# GitHub's dark background, lines have a contrast of at least 3 and text one of at least 4.2.
TEXT_COLOR = "#757a82"
COLORS = "#3b82f6", "#e36209", "#2a9d55", "#a45ee5", "#d6457f", "#1499a8"
MARKERS = "os^Dvp"
FIRST_NAMES = "llmsrv", "llama.cpp", "vLLM"  # have the same colours in every picture
WIDTH_INCHES = 9.375  # 900 px in a browser, where an inch is 96 px
LEGEND_CHARACTERS = 115  # as many as fit in one line


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--plot", type=Path, help="draw them as PNG, SVG or PDF, by its suffix")


def write_results(
    options: argparse.Namespace, rows: list[Row], built: dict[str, str] | None = None
) -> None:
    """built: how each server was built, by its name."""
    run = {"machine": describe(), "built": built or {}, "results": rows}
    if options.json:
        options.json.write_text(json.dumps(run, indent=1))
    if options.plot:
        draw(options.plot, [run])


def draw(path: Path, runs: list[dict[str, Any]]) -> None:
    """Draws a panel for each of PANELS, over the number of streams, with a line for each server.

    The servers of all runs share the panels.
    """
    import matplotlib
    from matplotlib.figure import Figure

    rows = [row for run in runs for row in run["results"]]
    built = {name: text for run in runs for name, text in run.get("built", {}).items()}
    names = list(dict.fromkeys(row["server"] for row in rows))
    labels = [f"{name}: {built[name]}" if name in built else name for name in names]
    labels = [textwrap.fill(label, LEGEND_CHARACTERS) for label in labels]
    machines = dict.fromkeys(run["machine"].partition("\n")[0] for run in runs)
    num_lines = sum(text.count("\n") + 1 for text in [*labels, *machines])
    with matplotlib.rc_context(style()):
        figure = Figure((WIDTH_INCHES, 2.7 + 0.17 * num_lines), layout="constrained")
        panels = figure.subplots(1, len(PANELS))
        for axes, (title, key, scale) in zip(panels, PANELS):
            axes.set_title(title)
            draw_panel(axes, names, rows, key, scale)
        figure.suptitle("\n".join(machines), x=0.006, ha="left")
        figure.legend(panels[0].get_lines(), labels, loc="outside lower left")
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        figure.savefig(path, transparent=True, dpi=192, metadata=metadata)


def draw_panel(axes: "Axes", names: list[str], rows: list[Row], key: str, scale: str) -> None:
    """A server called "NAME, VARIANT" has the colour of NAME, and its line is dashed.

    The shaded area spans the slowest and the fastest round.
    """
    from matplotlib.ticker import LogLocator
    from matplotlib.ticker import NullFormatter
    from matplotlib.ticker import StrMethodFormatter

    bases = list(dict.fromkeys([*FIRST_NAMES, *(name.partition(",")[0] for name in names)]))
    for name in names:
        base, comma, _ = name.partition(",")
        index = bases.index(base) % len(COLORS)
        own = [row for row in rows if row["server"] == name]
        streams = [row["streams"] for row in own]
        axes.plot(
            streams,
            [row[key] for row in own],
            color=COLORS[index],
            marker=MARKERS[index],
            linestyle="--" if comma else "-",
            fillstyle="none" if comma else "full",
        )
        rounds = [[each[key] for each in row.get("rounds", [row])] for row in own]
        low, high = list(map(min, rounds)), list(map(max, rounds))
        axes.fill_between(streams, low, high, color=COLORS[index], alpha=0.18, linewidth=0)
    ticks = sorted({row["streams"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel("concurrent streams")
    if scale == "log":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))


def style() -> Any:
    """As matplotlib.rcParams."""
    text = "text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"
    return {
        **dict.fromkeys(text, TEXT_COLOR),
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.titleweight": "bold",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.alpha": 0.3,
        "grid.color": TEXT_COLOR,
        "grid.linewidth": 0.6,
        "figure.titlesize": 9,
        "legend.frameon": False,
        "legend.handlelength": 3,
        "lines.linewidth": 1.8,
        "lines.markersize": 5,
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "bench",  # equal results give equal files
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="+", type=Path, help="that --json wrote")
    parser.add_argument("--plot", type=Path, required=True, help="PNG, SVG or PDF, by its suffix")
    options = parser.parse_args()
    draw(options.plot, [json.loads(path.read_text()) for path in options.files])


if __name__ == "__main__":
    main()
