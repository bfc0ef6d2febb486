"""Starts and ends a child process that runs Python code of ours.

A child is a fresh interpreter, not a fork of a process that may hold CUDA, threads or Ray. Of the
environment it gets only what an interpreter needs to start, so no credentials. It has a process
group of its own, so that a terminal's Ctrl-C reaches the parent alone.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

_KEPT_VARIABLES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME")


def start_child(
    arguments: Sequence[str], *, environment: Mapping[str, str] | None = None, **options: Any
) -> subprocess.Popen[bytes]:
    """Start ``python ARGUMENTS``; returns at once.

    ``environment`` holds variables to add; ``options`` are those of ``subprocess.Popen``.

    Raises:
        OSError: the process cannot be started.
    """
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    return subprocess.Popen(
        [sys.executable, *arguments], env=kept | dict(environment or {}), process_group=0, **options
    )


def open_shared(name: str) -> BinaryIO:
    """Open a new file to share with a child: in memory on Linux, where no full disk is in its way.

    Elsewhere it is a temporary file. ``name`` tells what it is in /proc.
    """
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create(name), "r+b")
    return tempfile.TemporaryFile()


def end_child(process: subprocess.Popen[bytes]) -> None:
    """Kill a child, if it still runs, and wait for its end; then close its pipes."""
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
