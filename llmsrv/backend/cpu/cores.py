"""How many threads to compute with: one for each physical core that this process may use."""

import os
from pathlib import Path

UNLIMITED_CPUS = 1 << 16


def default_threads() -> int:
    """The number of physical cores that this process may run on, or its cgroup's quota if less."""
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    if cpus is None:  # macOS, where each core has one thread
        return os.cpu_count() or 1
    cores = {_core_of(cpu) for cpu in cpus}
    return max(1, min(len(cores), _cgroup_cpus()))


def _core_of(cpu: int) -> str:
    """The same for all threads of a core."""
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    try:
        return path.read_text().strip()
    except OSError:
        return str(cpu)


def _cgroup_cpus() -> int:
    """The CPU time that cgroup v2 or v1 grants, in whole CPUs; UNLIMITED_CPUS without a limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        directory = Path("/sys/fs/cgroup/cpu")
        try:
            quota = (directory / "cpu.cfs_quota_us").read_text()
            period = (directory / "cpu.cfs_period_us").read_text()
        except OSError:
            return UNLIMITED_CPUS
    if quota.strip() in ("max", "-1"):
        return UNLIMITED_CPUS
    return max(1, int(quota) // int(period))
