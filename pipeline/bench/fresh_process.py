"""Runs a function in a fresh process, and reads the memory of this one."""

import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")


def run_fresh(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return ``function(*arguments)`` of a process that has done nothing else."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def read_memory_mb(field: str) -> float:
    """Return this process's resident memory in MB, from Linux' ``/proc`` where there is one.

    Elsewhere it is getrusage's peak, whatever ``field``; of a fresh process on Linux that would
    start from its parent's.

    Args:
        field: VmRSS for the memory now, VmHWM for its peak.
    """
    if _STATUS.exists():
        status = _STATUS.read_text(encoding="ascii")
        return int(status.split(f"{field}:")[1].split()[0]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes on macOS
