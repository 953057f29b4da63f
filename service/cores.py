"""How many cores this process may use. ONNX Runtime counts the machine's, and so oversubscribes a small container."""

from __future__ import annotations

import math
import os
from pathlib import Path


def usable_cores(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """The smaller of the affinity mask and the CPU quota of the control group (v2 or v1), rounded up; at least 1.

    `cgroups` is where control groups are mounted, `own` the file that says which ones this process is in.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for folder in _folders(cgroups, own) if (quota := _quota(folder)) is not None]
    return max(1, min([cores, *(math.ceil(quota) for quota in quotas)]))


def _folders(cgroups: Path, own: Path) -> list[Path]:
    """The control groups of this process and their ancestors: each may carry a quota."""
    found = [cgroups, cgroups / "cpu", cgroups / "cpu,cpuacct"]
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return found
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        root = cgroups if not controllers else cgroups / controllers
        if controllers and "cpu" not in controllers.split(","):
            continue
        folder = root
        for part in Path(path.lstrip("/")).parts:
            if part == "..":
                break
            folder = folder / part
            found.append(folder)
    return found


def _quota(folder: Path) -> float | None:
    """Cores that the group may use, or None where it has no limit."""
    try:
        quota, _, period = (folder / "cpu.max").read_text(encoding="ascii").strip().partition(" ")
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        pass
    try:
        micros = int((folder / "cpu.cfs_quota_us").read_text(encoding="ascii"))
        period_us = int((folder / "cpu.cfs_period_us").read_text(encoding="ascii"))
        return None if micros <= 0 else micros / period_us
    except (OSError, ValueError, ZeroDivisionError):
        return None
