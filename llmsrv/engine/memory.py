"""How much memory this process may have: the machine's, or less where a cgroup says so.

Source: Linux, Documentation/admin-guide/cgroup-v2.rst ("memory.max") and cgroup-v1/memory.rst
("memory.limit_in_bytes").
"""

import os
from collections.abc import Iterator
from pathlib import Path

# Below the root of the file system: where a version mounts its groups, and the limit's file.
V1 = "sys/fs/cgroup/memory", "memory.limit_in_bytes"
V2 = "sys/fs/cgroup", "memory.max"


def memory_limit(root: Path = Path("/")) -> tuple[int, str]:
    """Bytes, and whose limit that is: "the machine" or "the cgroup"."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    group = min(_cgroup_limits(root), default=machine)
    return (group, "the cgroup") if group < machine else (machine, "the machine")


def _cgroup_limits(root: Path) -> Iterator[int]:
    """The limits of every group that we are in, from ours to the topmost that can be seen."""
    for mount, name, group in _groups(root):
        # In a container the path may be that outside of it, and only the mount be there.
        for path in (group, *group.parents):
            try:
                text = (root / mount / path.relative_to("/") / name).read_text().strip()
            except (OSError, ValueError):
                continue
            if text.isdecimal():  # else "max"
                yield int(text)


def _groups(root: Path) -> Iterator[tuple[str, str, Path]]:
    """Mount, name of the limit's file and path of each group; lines of ID:CONTROLLERS:PATH."""
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
