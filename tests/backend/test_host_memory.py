"""The memory that a backend on the host may use: the machine's, or its cgroup's."""

from pathlib import Path

import pytest

from llmsrv.backend.base import MemoryLimit
from llmsrv.backend.host_memory import OVERHEAD_BYTES
from llmsrv.backend.host_memory import host_memory


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    "files",
    [
        {"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "1000000\n"},
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/b/memory.max": "max\n",
            "sys/fs/cgroup/a/memory.max": "1000000\n",
        },
        {"proc/self/cgroup": "0::/outside/of/it\n", "sys/fs/cgroup/memory.max": "1000000\n"},
        {
            "proc/self/cgroup": "5:cpu:/\n4:memory:/a\n0::/\n",
            "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "1000000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
    ],
)
def test_the_smallest_limit_of_the_cgroups_applies(tmp_path: Path, files: dict[str, str]) -> None:
    assert host_memory(write(tmp_path, files)) == MemoryLimit(
        1_000_000, "the cgroup", OVERHEAD_BYTES
    )


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"proc/self/cgroup": "0::/\n"},
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"},
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": f"{2**62}\n"},
    ],
)
def test_without_a_cgroup_limit_the_machine_limits(tmp_path: Path, files: dict[str, str]) -> None:
    limit = host_memory(write(tmp_path, files))
    assert limit.whose == "the machine" and 2**28 < limit.num_bytes < 2**50
