"""How much host memory this process may use: the machine's, or less if a cgroup limits it.

Source: Linux, Documentation/admin-guide/cgroup-v2.rst ("memory.max") and cgroup-v1/memory.rst
("memory.limit_in_bytes").
"""

import os
from collections.abc import Iterator
from pathlib import Path

from llmsrv.backend.base import MemoryLimit

# Server and engine process without weights and KV cache: interpreters, numpy, buffers of a step.
OVERHEAD_BYTES = 160 << 20
# Below the root of the file system: where each version mounts its groups, and the limit's file.
V1 = "sys/fs/cgroup/memory", "memory.limit_in_bytes"
V2 = "sys/fs/cgroup", "memory.max"


def host_memory(root: Path = Path("/")) -> MemoryLimit:
    """What a backend that computes on the host reports as its memory."""
    machine = machine_bytes()
    group = min(_cgroup_limits(root), default=machine)
    if group < machine:
        return MemoryLimit(group, "the cgroup", OVERHEAD_BYTES)
    return MemoryLimit(machine, "the machine", OVERHEAD_BYTES)


def machine_bytes() -> int:
    """The machine's physical memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup_limits(root: Path) -> Iterator[int]:
    """The limit of every group that contains this process, innermost first."""
    for mount, name, group in _groups(root):
        # In a container the path may be the host's, and only the mount itself be visible.
        for path in (group, *group.parents):
            try:
                text = (root / mount / path.relative_to("/") / name).read_text().strip()
            except (OSError, ValueError):
                continue
            if text.isdecimal():  # else "max"
                yield int(text)


def _groups(root: Path) -> Iterator[tuple[str, str, Path]]:
    """Mount, name of the limit's file and path of each group; a line is ID:CONTROLLERS:PATH."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return  # not Linux
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield *V2, Path(path)
        elif "memory" in controllers.split(","):
            yield *V1, Path(path)
