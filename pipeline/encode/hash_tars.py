"""Hashes the tars whose marks changed since they were encoded, on the cluster's nodes.

Without Ray the tars are read in this process, some at once by threads. A tar that cannot be read is
its own fault and stops no other.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import ray

from pipeline.base.progress import Progress
from pipeline.base.ray_cluster import ray_running
from pipeline.corpus.source import SourceChangedError, hash_tar
from pipeline.corpus.tasks import Task

_NUM_THREADS = 8  # of this process, where there is no Ray
_IN_FLIGHT_A_CPU = 2  # tars handed to Ray at once


@dataclass(frozen=True, slots=True)
class TarDigests:
    """SHA-256 (hex) of tars by URL, and the errors of those that could not be read."""

    digests: dict[str, str] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)


def hash_tars(tars: Sequence[Task], *, on_ray: bool) -> TarDigests:
    """Read tars whole, and show progress. Starts Ray, or connects to it, where it is to be used."""
    found = TarDigests()
    with Progress("compare", total=len(tars), unit="tars", metrics_path=None) as progress:
        results = _hash_on_ray(tars) if on_ray else _hash_here(tars)
        for number, (url, digest, error) in enumerate(results, 1):
            if error:
                found.unread[url] = error
            else:
                found.digests[url] = digest
            progress.update(number)
    return found


def _hash(tar: Task) -> tuple[str, str, str]:
    """Return a tar's URL, its SHA-256 and the error that it could not be read for, or ""."""
    try:
        return tar.url, hash_tar(tar), ""
    except (OSError, SourceChangedError) as error:
        return tar.url, "", f"{type(error).__name__}: {error}"


def _hash_here(tars: Sequence[Task]) -> Iterator[tuple[str, str, str]]:
    with ThreadPoolExecutor(min(_NUM_THREADS, os.cpu_count() or 1)) as pool:
        yield from pool.map(_hash, tars)


def _hash_on_ray(tars: Sequence[Task]) -> Iterator[tuple[str, str, str]]:
    with ray_running():
        hash_remote: Any = ray.remote(num_cpus=1, max_retries=3)(_hash)
        at_once = _IN_FLIGHT_A_CPU * max(1, int(ray.cluster_resources().get("CPU", 1)))
        running: list[Any] = []
        for tar in tars:
            if len(running) >= at_once:
                done, running = ray.wait(running)
                yield from ray.get(done)
            running.append(hash_remote.options(name=f"hash {tar.id}").remote(tar))
        while running:
            done, running = ray.wait(running)
            yield from ray.get(done)
