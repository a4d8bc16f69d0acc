"""Describes the machine and the command, which every benchmark prints first; measures processes."""

import os
import platform
import shlex
import sys
from datetime import UTC
from datetime import datetime
from pathlib import Path


def describe() -> str:
    """Two lines: the date and the machine; the command."""
    now = datetime.now(UTC).strftime("%Y-%m-%d")
    return (
        f"{now}, {_cpu()}, {os.cpu_count()} cores, {_memory_gib()} GiB, "
        f"{platform.system()}, Python {platform.python_version()}\n"
        f"$ python -m bench.{Path(sys.argv[0]).stem} {shlex.join(sys.argv[1:])}"
    )


def pss_mb(pid: int) -> float:
    """Resident memory of a process in MB; a shared page counts in proportion (PSS)."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1000
    raise ValueError("no Pss in smaps_rollup")


def descendants_cpu_s(pid: int) -> float:
    """CPU time so far of the children that the process's main thread started, and of theirs."""
    seconds = 0.0
    for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[11]) + int(fields[12])  # proc(5): utime and stime
        seconds += ticks / os.sysconf("SC_CLK_TCK") + descendants_cpu_s(child)
    return seconds


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _memory_gib() -> int:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
