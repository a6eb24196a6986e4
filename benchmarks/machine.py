"""On what was it measured?"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["cpu_times", "describe", "disturbance", "versions"]

_PACKAGES = (
    "celery-pg",
    "celery",
    "kombu",
    "amqp",
    "py-amqp",
    "redis",
    "SQLAlchemy",
    "psycopg2-binary",
    "psycopg2",
    "billiard",
)
_PROBES = 200


def describe() -> dict[str, Any]:
    """Return cores, kernel, and what it costs to flush 4 KB where the private Redis keeps its file."""
    directory = tempfile.gettempdir()
    return {
        "cores": os.cpu_count(),
        "cpu": _cpu_model(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": f"{platform.system()} {platform.release()}",
        "load_before": [round(load, 2) for load in os.getloadavg()],
        "flush": {"directory": directory, "filesystem": _filesystem(directory), **_flush_times(directory)},
    }


def versions() -> dict[str, str]:
    """Return versions of the interpreter, the libraries that are installed, and the tree."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if commit := _commit():
        found["commit"] = commit
    return found


def cpu_times() -> list[int]:
    """The machine's CPU times so far: user, nice, system, idle, iowait, irq, softirq, steal."""
    try:
        return [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return [0] * 8


def disturbance(before: list[int]) -> dict[str, float]:
    """Return which share of the CPUs' time other virtual machines took since, and the load now."""
    spent = [now - then for now, then in zip(cpu_times(), before, strict=True)]
    return {
        "steal_percent": round(100 * spent[7] / max(1, sum(spent)), 2),
        "load_after": round(os.getloadavg()[0], 2),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _filesystem(directory: str) -> str:
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return "unknown"
    real = os.path.realpath(directory)
    below = [(point, kind) for point, kind in mounts if os.path.commonpath([real, point]) == point]
    return max(below, key=lambda mount: len(mount[0]), default=("", "unknown"))[1]


def _flush_times(directory: str) -> dict[str, float]:
    """Append 4 KB and flush it, again and again; microseconds."""
    taken = []
    with tempfile.NamedTemporaryFile(dir=directory, prefix="bench-flush-") as file:
        for _ in range(_PROBES):
            began = time.perf_counter()
            os.write(file.fileno(), bytes(4096))
            os.fdatasync(file.fileno())
            taken.append((time.perf_counter() - began) * 1e6)
    taken.sort()
    return {"median_us": round(statistics.median(taken), 1), "p95_us": round(taken[int(len(taken) * 0.95)], 1)}


def _commit() -> str | None:
    git = shutil.which("git")
    if git is None:
        return None
    root = Path(__file__).parent.parent
    said = subprocess.run(
        [git, "-C", root, "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return said.stdout.strip() or None


if sys.platform != "linux":
    raise ImportError("the benchmarks need Linux: one monotonic clock for all processes, and /proc")
