"""Runs the whole self-test and prints its report as it goes."""

import gc
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import asdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmsrv.backend.base import Backend
from llmsrv.selftest.cases import kernel_cases
from llmsrv.selftest.kernels import Outcome
from llmsrv.selftest.kernels import check_kernels
from llmsrv.selftest.models import ModelOutcome
from llmsrv.selftest.models import check_model
from llmsrv.selftest.models import tiny_models
from llmsrv.selftest.sampling import sampling_differences
from llmsrv.selftest.speed import Rates
from llmsrv.selftest.speed import Size
from llmsrv.selftest.speed import Speed
from llmsrv.selftest.speed import measure
from llmsrv.selftest.speed import measure_rates
from llmsrv.version import __version__

PACKAGES = "numpy", "cupy-cuda13x", "cupy-cuda12x", "nvidia-cuda-nvrtc", "nvidia-cuda-runtime"
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
# A CPU would take minutes for what keeps a GPU busy.
SMALLER = Size(weight_bytes=32 << 20, repeats=1, context=1024, copy_layers=32, prefill_rows=64)
SIZES = {
    "cpu": SMALLER,
    "reference": replace(SMALLER, hidden=256, inner=512, heads=4, kv_heads=2, vocab=1000),
}
MAX_SENTENCES = 5  # of differences that are printed; all are counted


class Report:
    """Prints lines and keeps the results, for JSON.

    results     part -> its rows
    num_faults  what must not be
    """

    def __init__(self, write: Callable[[str], None]) -> None:
        self.write = write
        self.results: dict[str, Any] = {}
        self.num_faults = 0

    def add(self, part: str, row: Any, is_right: bool = True) -> None:
        self.results.setdefault(part, []).append(row)
        self.num_faults += not is_right


def run_selftest(backend: Backend, write: Callable[[str], None]) -> Report:
    """Checks kernels, sampling and whole models, then measures the kernels.

    write  prints one line
    """
    start_s = time.monotonic()
    report = Report(write)
    for line in _header(backend):
        write(line)
        report.add("machine", line)
    _report_kernels(report, backend)
    _report_sampling(report, backend)
    _report_models(report, backend)
    _report_speed(report, backend)
    faults = f"{report.num_faults} FAULTS" if report.num_faults else "no faults"
    write(f"\n{faults}; {time.monotonic() - start_s:.1f} s")
    return report


def to_json(report: Report) -> str:
    return json.dumps({"faults": report.num_faults, **report.results}, indent=1)


def _header(backend: Backend) -> Iterator[str]:
    yield f"llmsrv {__version__}, backend {backend.name}: {backend.description}"
    versions = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            pass
    yield f"{platform.system()} {platform.machine()}, {', '.join(versions)}"
    if NVIDIA_DRIVER.exists():
        yield NVIDIA_DRIVER.read_text().splitlines()[0]


def _report_kernels(report: Report, backend: Backend) -> None:
    report.write(f"\n{'kernel':40}{'cases':>7}{'max error':>12}{'allowed':>10}")
    for outcome in check_kernels(backend, kernel_cases()):
        report.write(_kernel_line(outcome))
        report.add("kernels", asdict(outcome), outcome.is_right)


def _kernel_line(outcome: Outcome) -> str:
    line = f"{outcome.name:40}{outcome.num_cases:7}{outcome.error:12.1e}{outcome.max_error:10.1e}"
    return line + f"  WRONG {outcome.failure}" * (not outcome.is_right)


def _report_sampling(report: Report, backend: Backend) -> None:
    try:
        found = list(sampling_differences(backend))
    except Exception as error:  # the models are still checked
        found = [f"{type(error).__name__}: {error}"]
    for sentence in found:
        report.add("sampling", sentence, is_right=False)
    wrong = f"WRONG {len(found)} differences"
    report.write(f"{'Sampling, bit for bit':40}{wrong if found else 'no difference':>29}")
    for sentence in found[:MAX_SENTENCES]:
        report.write(f"    {sentence}")


def _report_models(report: Report, backend: Backend) -> None:
    report.write(f"\n{'model':40}{'mean error':>12}{'allowed':>10}{'agreement':>11}")
    for model in tiny_models():
        try:
            outcome = check_model(backend, model)
        except Exception as error:  # the other models are still checked
            failure = f"{type(error).__name__}: {error}"
            report.write(f"{model.name:40}  WRONG {failure}")
            report.add("models", {"name": model.name, "failure": failure}, is_right=False)
            continue
        gc.collect()  # plans refer to themselves, and hold memory of the device
        report.write(_model_line(outcome))
        report.add("models", asdict(outcome), outcome.is_right)


def _model_line(outcome: ModelOutcome) -> str:
    line = f"{outcome.name:40}{outcome.error:12.1e}{outcome.max_error:10.1e}"
    line += f"{outcome.agreement:11.1%}"
    wrong = f"  WRONG, {outcome.disagreements} clear choices differ"
    return line + wrong * (not outcome.is_right)


def _report_speed(report: Report, backend: Backend) -> None:
    try:
        size = SIZES.get(backend.name, Size())
        rates = measure_rates(backend, size)
        report.add("rates", asdict(rates))
        report.write(f"\n{_rates_line(rates)}")
        heading = f"{'us':>10}{'GB/s':>9}{'of it':>7}{'GMAC/s':>10}{'of it':>7}"
        report.write(f"{'kernel, one call':50}{heading}")
        for speed in measure(backend, size):
            report.write(_speed_line(speed, rates))
            report.add("speed", asdict(speed))
    except Exception as error:  # what was found before still counts
        report.write(f"WRONG {type(error).__name__}: {error}")
        report.add("speed", f"{type(error).__name__}: {error}", is_right=False)


def _rates_line(rates: Rates) -> str:
    product = "not measured" if rates.product is None else f"{rates.product / 1e9:,.0f} GMAC/s"
    return (
        f"A large copy moves {rates.copy / 1e9:,.0f} GB/s, read and written; "
        f"a large product of 16-bit matrices: {product}"
    )


def _speed_line(speed: Speed, rates: Rates) -> str:
    line = f"{speed.name:50}{1e6 * speed.seconds:10.1f}"
    line += f"{speed.bytes_per_s / 1e9:9,.1f}{speed.bytes_per_s / rates.copy:7.0%}"
    if speed.num_products:
        line += f"{speed.products_per_s / 1e9:10,.0f}"
        if rates.product is not None:
            line += f"{speed.products_per_s / rates.product:7.0%}"
    return line
