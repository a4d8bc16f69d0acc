"""The table of bench.cuda, from its results; also from a file:

python -m bench.cuda_table results.json
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Result = dict[str, Any]


def table(results: list[Result]) -> Iterator[str]:
    """Decode and prefill of each shape and type, next to PyTorch and to the device's limits."""
    limits = next((each for each in results if each["part"] == "limits"), {})
    if limits:
        yield ""
        yield (
            f"copy {limits['copy'] / 1e12:.2f} TB/s read and written, "
            f"read {limits['read'] / 1e12:.2f} TB/s, "
            f"bfloat16 product {limits['product'] / 1e12:.0f} TFLOP/s"
        )
    for part, size in (("decode", "streams"), ("prefill", "tokens")):
        rows = [each for each in results if each["part"] == part and "rate" in each]
        ours = [each for each in rows if "backend" in each]
        if not ours:
            continue
        yield ""
        heading = f"{part + ', tokens/s':20}{'weights':>8}{size:>9}{'mode':>8}{'llmsrv':>11}"
        yield heading + f"{'of limit':>10}{'PyTorch':>11}{'ratio':>7}  PyTorch's mode"
        for each in ours:
            yield _line(each, _best_peer(rows, each, size), limits, size)


def _line(ours: Result, peer: Result | None, limits: Result, size: str) -> str:
    share = _share(ours, limits)
    line = f"{ours['shape']:20}{ours['type']:>8}{ours[size]:9}{ours.get('mode', ''):>8}"
    line += f"{ours['rate']:11,.0f}" + (f"{share:10.0%}" if share is not None else " " * 10)
    if peer is None:
        return line
    return line + f"{peer['rate']:11,.0f}{ours['rate'] / peer['rate']:7.2f}  {peer['mode']}"


def _best_peer(rows: list[Result], ours: Result, size: str) -> Result | None:
    same = [
        each
        for each in rows
        if "peer" in each and (each["shape"], each[size]) == (ours["shape"], ours[size])
    ]
    return max(same, key=lambda each: float(each["rate"]), default=None)


def _share(ours: Result, limits: Result) -> float | None:
    """Of the bandwidth for reading that a decode step uses, or of the product rate in prefill."""
    if limits and "step_bytes" in ours:
        return float(ours["rate"] / ours["streams"] * ours["step_bytes"] / limits["read"])
    if limits and "flops" in ours:
        return float(ours["rate"] / ours["tokens"] * ours["flops"] / limits["product"])
    return None


def main() -> None:
    for line in table(json.loads(Path(sys.argv[1]).read_text())["results"]):
        print(line)


if __name__ == "__main__":
    main()
