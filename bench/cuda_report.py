"""What the CUDA backend should cost on GPUs that are not at hand.  Everything here is computed.

python -m bench.cuda_report [--shapes A,B] [--types BF16,...] [--architectures 75,90,...]
                            [--streams 1] [--json PATH] [--plot PATH]

The launches of a decode step are recorded from the backend itself (tests/support/cuda_launches.py),
NVRTC compiles their kernels (tests/support/nvrtc.py), and ptxas says what they need: registers,
spills and shared memory, from which the occupancy follows.  Each launch moves at least the bytes of
its operands and computes at least their products; the larger of the two times on a typical card is
its roofline.  A step is the sum over its launches, plus what a launch costs in a CUDA graph.
"""

import argparse
import json
import multiprocessing
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.cuda_work import Work
from bench.cuda_work import work_of
from bench.machine import describe
from bench.shapes import SHAPES
from llmsrv.backend.base import BLOCK_SIZE
from llmsrv.backend.base import Limits
from llmsrv.backend.cuda.source import kernel_source
from llmsrv.backend.sampling.table import SamplingParameters
from llmsrv.selftest.batches import Piece
from llmsrv.selftest.batches import batch_of
from llmsrv.selftest.made_models import Shape
from llmsrv.selftest.made_models import make_program
from tests.support.cuda_launches import Launch
from tests.support.cuda_launches import recording
from tests.support.cuda_launches import step_launches
from tests.support.nvrtc import ARCHITECTURES
from tests.support.nvrtc import Resources
from tests.support.nvrtc import compile_kernels
from tests.support.nvrtc import version

CONTEXT_TOKENS = 1024
# Of a kernel in a graph: 150 of them take about 0.2 ms.
LAUNCH_S = 1.3e-6
NUM_PROCESSES = 2
GREEDY = SamplingParameters(temperature=0)


@dataclass(frozen=True)
class Card:
    """A typical card of an architecture, by its data sheet.

    bytes_per_s  of its memory
    memory_gb    size of its memory
    flops        dense products of 16-bit values with sums in float32
    """

    name: str
    num_multiprocessors: int
    bytes_per_s: float
    memory_gb: int
    flops: float


CARDS = {
    75: Card("T4", 40, 320e9, 16, 65e12),
    80: Card("A100 80 GB", 108, 2039e9, 80, 312e12),
    86: Card("RTX 3090", 82, 936e9, 24, 71e12),
    89: Card("L40S", 142, 864e9, 48, 362e12),
    90: Card("H200", 132, 4800e9, 141, 989e12),
    100: Card("B200", 148, 8000e9, 180, 2250e12),
    120: Card("RTX 5090", 170, 1792e9, 32, 210e12),
}


@dataclass(frozen=True)
class Row:
    """One kernel of a step, which the step launches num_launches times.

    seconds  of one launch, by the roofline
    """

    kernel: str
    num_launches: int
    resources: Resources
    shared_bytes: int
    occupancy: float
    work: Work
    seconds: float


@dataclass(frozen=True)
class Step:
    shape: str
    type: str
    capability: int
    num_streams: int
    rows: list[Row]

    @property
    def num_launches(self) -> int:
        return sum(row.num_launches for row in self.rows)

    @property
    def roofline_s(self) -> float:
        return sum(row.num_launches * row.seconds for row in self.rows)

    @property
    def seconds(self) -> float:
        return self.roofline_s + LAUNCH_S * self.num_launches

    @property
    def fits(self) -> bool:
        """Whether what a step reads fits into the card's memory with something to spare."""
        num_bytes = sum(row.num_launches * row.work.num_bytes for row in self.rows)
        return num_bytes < 0.9e9 * CARDS[self.capability].memory_gb

    @property
    def streams(self) -> str:
        return f"{self.num_streams} stream" + "s" * (self.num_streams > 1)


def recorded_step(shape: Shape, type: str, capability: int, num_streams: int) -> list[Launch]:
    """The launches of a decode step.  One layer is recorded, and repeated."""
    num_blocks = CONTEXT_TOKENS // BLOCK_SIZE
    limits = Limits(max(64, num_streams), num_streams, num_streams, num_blocks + 1)
    # Streams share blocks: nothing is computed.
    piece = Piece([0], CONTEXT_TOKENS - 1, range(1, num_blocks + 1))
    batch = batch_of([piece] * num_streams)
    program = make_program(replace(shape, num_layers=1), type, is_empty=True)
    processors = CARDS[capability].num_multiprocessors
    with recording(capability, processors, dtype="auto", packs_weights=False) as (backend, record):
        plan = backend.compile(program, limits, lambda: None)
        return step_launches(plan, record, batch, [GREEDY])


def compiled(steps: Iterable[tuple[int, list[Launch]]]) -> dict[tuple[int, Any], Any]:
    """(capability, module) -> its kernels' resources.

    NVRTC runs in processes of its own, where the stand-in's driver is not loaded.
    """
    modules = list({(capability, each.module) for capability, some in steps for each in some})
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(NUM_PROCESSES, context) as pool:
        found = pool.map(
            compile_kernels,
            [kernel_source(module.stem) for _, module in modules],
            [module.options for _, module in modules],
            [capability for capability, _ in modules],
            chunksize=4,
        )
        return dict(zip(modules, found, strict=True))


def rows_of(
    launches: list[Launch], shape: Shape, capability: int, num_streams: int, modules: Any
) -> list[Row]:
    """Equal launches of a layer are one row."""
    architecture, card = ARCHITECTURES[capability], CARDS[capability]
    counts: dict[Any, int] = {}
    for launch in launches:
        work = work_of(launch, num_streams, CONTEXT_TOKENS, shape)
        key = launch, work
        counts[key] = counts.get(key, 0) + (shape.num_layers if work.is_in_layer else 1)
    rows = []
    for (launch, work), count in counts.items():
        resources = modules[capability, launch.module][launch.function]
        shared_bytes = resources.shared_bytes + launch.shared_bytes
        occupancy = architecture.occupancy(resources.registers, shared_bytes, launch.num_threads)
        seconds = max(work.num_bytes / card.bytes_per_s, work.flops / card.flops)
        name = f"{launch.function}, {work.what}"
        rows.append(Row(name, count, resources, shared_bytes, occupancy, work, seconds))
    return rows


# ---- Output


def print_step(step: Step) -> None:
    card = CARDS[step.capability]
    print(f"\n{step.shape}, {step.type}, {step.streams}, sm_{step.capability} ({card.name})")
    print(
        f"{'kernel':36}{'times':>6}{'regs':>6}{'spills':>7}{'shared':>8}{'warps':>7}"
        f"{'KB':>10}{'MFLOP':>9}{'us':>8}"
    )
    for row in step.rows:
        needs = row.resources
        print(
            f"{row.kernel:36}{row.num_launches:6}{needs.registers:6}{needs.spill_bytes:7}"
            f"{row.shared_bytes:8}{row.occupancy:7.0%}{row.work.num_bytes / 1e3:10,.0f}"
            f"{row.work.flops / 1e6:9,.1f}{1e6 * row.seconds:8.2f}"
        )


def print_summary(steps: list[Step]) -> None:
    print("\nA decode step, computed: roofline of its launches + their cost = tokens/s")
    for step in steps:
        name = f"{step.shape}, {step.type}, {step.streams}"
        card = f"sm_{step.capability} {CARDS[step.capability].name}"
        launches_ms = 1e3 * LAUNCH_S * step.num_launches
        print(
            f"{name:34}{card:20}{1e3 * step.roofline_s:8.3f} ms + {launches_ms:.3f} ms "
            f"({step.num_launches} launches) ={step.num_streams / step.seconds:9,.0f}"
            + "   (does not fit)" * (not step.fits)
        )


def draw(path: Path, steps: list[Step]) -> None:
    """Tokens per second by card: a panel for each shape, a marker for each type that fits."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator
    from matplotlib.ticker import NullFormatter
    from matplotlib.ticker import StrMethodFormatter

    from bench.results import COLORS
    from bench.results import MARKERS
    from bench.results import WIDTH_INCHES
    from bench.results import style

    shapes = list(dict.fromkeys(step.shape for step in steps))
    types = list(dict.fromkeys(step.type for step in steps))
    capabilities = list(dict.fromkeys(step.capability for step in steps))
    with matplotlib.rc_context(style()):
        figure = Figure((WIDTH_INCHES, 3.6), layout="constrained")
        panels = figure.subplots(1, len(shapes), squeeze=False)[0]
        for axes, shape in zip(panels, shapes):
            axes.set_title(shape)
            for index, type in enumerate(types):
                own = [s for s in steps if (s.shape, s.type) == (shape, type) and s.fits]
                axes.plot(
                    [capabilities.index(step.capability) for step in own],
                    [step.num_streams / step.seconds for step in own],
                    color=COLORS[index],
                    marker=MARKERS[index],
                    linestyle="",
                    label=type,
                )
            names = [CARDS[capability].name for capability in capabilities]
            axes.set_xticks(range(len(names)), names, rotation=60)
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        panels[0].set_ylabel("tokens/s")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=3)
        title = f"COMPUTED from bytes, products and launches, not measured; {steps[0].streams}"
        figure.suptitle(title, x=0.006, ha="left")
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        figure.savefig(path, transparent=True, dpi=192, metadata=metadata)


def main() -> None:
    real = [name for name in SHAPES if name != "tiny"]
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", default=",".join(real))
    parser.add_argument("--types", default="BF16,Q8_0,Q4_K")
    parser.add_argument("--architectures", default=",".join(map(str, ARCHITECTURES)))
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--plot", type=Path, help="draw the steps as PNG, SVG or PDF")
    options = parser.parse_args()
    chosen = [
        (SHAPES[shape], type, int(capability))
        for shape in options.shapes.split(",")
        for type in options.types.split(",")
        for capability in options.architectures.split(",")
    ]
    print(describe())
    print(f"COMPUTED, not measured; NVRTC {version()}, {CONTEXT_TOKENS} tokens of context")
    recorded = [recorded_step(*each, options.streams) for each in chosen]
    modules = compiled((each[2], launches) for each, launches in zip(chosen, recorded))
    steps = []
    for (shape, type, capability), launches in zip(chosen, recorded):
        rows = rows_of(launches, shape, capability, options.streams, modules)
        steps.append(Step(shape.name, type, capability, options.streams, rows))
        print_step(steps[-1])
    print_summary(steps)
    if options.json:
        found = {"computed": True, "machine": describe(), "steps": [asdict(step) for step in steps]}
        options.json.write_text(json.dumps(found, indent=1))
    if options.plot:
        draw(options.plot, steps)


if __name__ == "__main__":
    main()
