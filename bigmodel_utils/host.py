"""The computer's own memory, told without torch, which takes long to import."""

from __future__ import annotations

import math
from pathlib import Path, PurePosixPath


def available_memory_bytes(root: Path = Path("/")) -> int:
    """Memory that this process could still take without swapping, and within the limit of its container.

    Args:
        root: where /proc and /sys are looked for, for the limit of a Linux container.
    """
    import psutil

    return int(max(0, min(psutil.virtual_memory().available, _container_bytes(root))))


def _container_bytes(root: Path) -> float:
    """What the control groups of this process, and those around them, leave it; infinite where nothing is limited.

    Linux's documentation: https://docs.kernel.org/admin-guide/cgroup-v2.html and .../cgroup-v1/memory.html.
    """
    left, table = math.inf, root / "proc/self/cgroup"
    for line in table.read_text().splitlines() if table.is_file() else ():
        _, controllers, path = line.split(":", 2)  # "0::/app.slice" in version 2, "4:cpu,memory:/docker/1f" in version 1
        if controllers == "":
            folder, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            folder = root / "sys/fs/cgroup/memory"
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        left = min([left, *(_group_bytes(folder / above, *names) for above in (group, *group.parents))])
    return left


def _group_bytes(folder: Path, limit_name: str, used_name: str, cache_name: str) -> float:
    """Limit minus use of one control group; cached files count as used, but are given back when memory is short."""
    try:
        limit = (folder / limit_name).read_text().strip()
        counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        used = int((folder / used_name).read_text()) - int(counts[cache_name])
    except (OSError, KeyError):  # the root group has no limit, and a container does not see the groups around it
        return math.inf
    return math.inf if limit == "max" else int(limit) - used
