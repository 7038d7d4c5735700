"""The control groups above this process (Linux containers, versions 1 and 2): where their limits lie, and how much
processor they leave."""

from __future__ import annotations

import math
import os
from pathlib import Path

_PROC_CGROUP = Path("/proc/self/cgroup")
_CGROUP_ROOT = Path("/sys/fs/cgroup")
# systemd mounts version 1's "cpu" together with "cpuacct", under either name or both.
_V1_FOLDERS = {"memory": ("memory",), "cpu": ("cpu", "cpu,cpuacct")}


def groups(controller: str) -> list[tuple[Path, int]]:
    """(folder, version) from this process's group up to the root, for "memory" or "cpu". Not every folder exists."""
    roots = {1: [_CGROUP_ROOT / name for name in _V1_FOLDERS[controller]], 2: [_CGROUP_ROOT]}
    places = {(root, version): None for version in (2, 1) for root in roots[version]}
    try:
        lines = _PROC_CGROUP.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        version = 1 if controllers else 2
        for root in roots[version]:
            folder = root / path.lstrip("/")
            while folder != root and root in folder.parents:
                places[(folder, version)] = None
                folder = folder.parent
    return list(places)


def cpu_quota() -> float | None:
    """Processors' worth of time that the tightest group allows, such as 1.5; None where there is no limit."""
    found = []
    for folder, version in groups("cpu"):
        try:
            if version == 2:
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota = (folder / "cpu.cfs_quota_us").read_text().strip()
                period = (folder / "cpu.cfs_period_us").read_text().strip()
            share = float(quota) / float(period)
        except (OSError, ValueError, ZeroDivisionError):  # absent, or "max"
            continue
        if share > 0 and math.isfinite(share):  # version 1 writes -1 for "no limit"
            found.append(share)
    return min(found, default=None)


def usable_cpus() -> int:
    """Processors that this process may keep busy: those it may run on, and no more than its container's quota.

    A quota is rounded down: a thread too many spends the time of the others, and all of them wait out the period.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return allowed if quota is None else max(1, min(allowed, math.floor(quota)))
