"""How near the encode stage comes to a device that never waits.

A corpus is encoded by the real stage into a scratch store, and the very batches that it computed
are computed again in a bare loop, from memory, with no input and no output: in turns, in one run.
Prompts are encoded anew for each tar here, so that both do the same.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from models.ldm.encoders import COMPUTE_DTYPES
from models.ldm.tuning import Tuning
from pipeline.base.machine import wait_for_device
from pipeline.bench.profile import (
    ProfileOptions,
    build_encode_batch,
    count_parts,
    read_ldm_configs,
)
from pipeline.encode.prepare import EncodeRun, prepare_encode
from pipeline.spec.fields import Spec
from pipeline.stage.device import Clock, Pass
from pipeline.stage.encode_stage import EncodeStage
from pipeline.stage.prompt_cache import PromptCache
from pipeline.stage.work import EncodeConfig, Outcome
from pipeline.store.commit import RecordName, read_commit
from pipeline.store.store import Store

MAX_GENERATION = 9999  # of parts that are never committed


@dataclass(frozen=True, slots=True)
class BatchRow:
    """The batches of one kind: how many, how large, and the least mean time of one, in ms."""

    stage: str
    batches: int
    rows: int
    ms_a_batch: float


@dataclass(frozen=True, slots=True)
class TurnRow:
    """One turn: the stage, from its first batch's start to its last one's end, and the bare loop.

    ``busy`` is the share of that span in which the device worked, ``of_bare_loop`` the bare loop's
    time over the span. ``whole_s`` is all of it, from the first tar's opening to the last commit.
    """

    turn: int
    bare_s: float
    span_s: float
    whole_s: float
    busy: float
    of_bare_loop: float


@dataclass(frozen=True, slots=True)
class EncodeSpeed:
    """What the stage did a second of its median turn, and the device's share of its own peak.

    ``tflops`` counts convolutions and matrix products over the bare loop's time, ``of_peak`` is
    that over ``peak_tflops``, a large matrix product's in the same run and dtype.
    """

    images_a_s: float
    pairs_a_s: float
    draws_a_s: float
    written_gb_a_s: float
    tflops: float
    peak_tflops: float
    of_peak: float


@dataclass(frozen=True, slots=True)
class EncodeBench:
    """All that was measured; ``busy`` and ``of_bare_loop`` are medians over the turns."""

    batches: tuple[BatchRow, ...]
    turns: tuple[TurnRow, ...]
    speed: EncodeSpeed

    @property
    def busy(self) -> float:
        """Share of the span in which the device worked."""
        return statistics.median(turn.busy for turn in self.turns)

    @property
    def of_bare_loop(self) -> float:
        """Throughput over the bare loop's."""
        return statistics.median(turn.of_bare_loop for turn in self.turns)


@dataclass(frozen=True, slots=True)
class _Batch:
    stage: str
    work: Pass


def measure_encode(
    spec: Spec,
    patterns: Sequence[str],
    folder: Path,
    *,
    batch: int,
    num_threads: int | None = None,
    num_decoders: int = 1,
    turns: int = 3,
    tuning: Tuning,
) -> EncodeBench:
    """Encode a corpus into stores under ``folder`` and compare with a bare loop, in turns.

    A turn before the first warms up. The batches stay in memory: choose a corpus that fits.

    Raises:
        ValueError: the spec has no features section, or a task failed.
    """
    if spec.features is None:
        raise ValueError("bench encode: expected a spec with a features section, got none")
    run = _prepare(spec, patterns, folder / "warm", batch=batch, tuning=tuning)
    config = replace(run.config, num_threads=num_threads, num_decoders=num_decoders)
    with _opened_stage(config) as stage:
        outcomes, *_ = _encode(stage, run)
        batches = [_Batch(*found) for found in _list_batches(stage, run)]
    rows = []
    times: dict[str, list[float]] = {}
    for turn in range(turns):
        bare_s = _run_bare(batches, times, stage.device.torch_device)
        again = _prepare(spec, patterns, folder / str(turn), batch=batch, tuning=tuning)
        with _opened_stage(replace(config, store_url=again.config.store_url)) as stage:
            _, clock, whole_s = _encode(stage, again)
        span_s = clock.last_s - clock.first_s
        rows.append(TurnRow(turn, bare_s, span_s, whole_s, clock.busy_s / span_s, bare_s / span_s))
    kinds = tuple(_describe_batches(batches, times))
    span_s = statistics.median(row.span_s for row in rows)
    bare_s = statistics.median(row.bare_s for row in rows)
    flops = _count_row_flops(spec)
    tflops = sum(kind.rows * flops[kind.stage] for kind in kinds) / bare_s / 1e12
    peak = _measure_peak(stage.device.torch_device, spec.features.compute)
    num = {kind.stage: kind.rows for kind in kinds}
    speed = EncodeSpeed(
        images_a_s=num["vae"] / span_s,
        pairs_a_s=sum(outcome.num_pairs for outcome in outcomes) / span_s,
        draws_a_s=num["unet"] / span_s,
        written_gb_a_s=sum(outcome.num_bytes for outcome in outcomes) / span_s / 1e9,
        tflops=tflops,
        peak_tflops=peak,
        of_peak=tflops / peak,
    )
    return EncodeBench(kinds, tuple(rows), speed)


def _prepare(
    spec: Spec, patterns: Sequence[str], store: Path, *, batch: int, tuning: Tuning
) -> EncodeRun:
    return prepare_encode(spec, patterns, str(store), batch=batch, tuning=tuning)


@contextmanager
def _opened_stage(config: EncodeConfig) -> Iterator[EncodeStage]:
    """A stage with its models loaded and its decoders running, no prompt kept from tar to tar."""
    stage = EncodeStage(config)
    assert config.features is not None, "it was checked"
    stage.load_latents().prompts = PromptCache(max_bytes=0)
    stage.load_features(config.features)
    try:
        yield stage
    finally:
        stage.close()


def _encode(stage: EncodeStage, run: EncodeRun) -> tuple[list[Outcome], Clock, float]:
    stage.device.clock = Clock()
    started_s = time.perf_counter()
    outcomes = [future.result() for future in [stage.submit(item) for item in run.items]]
    whole_s = time.perf_counter() - started_s
    if failed := [outcome for outcome in outcomes if outcome.status != "committed"]:
        raise ValueError(f"bench encode: {failed[0].task} {failed[0].status}: {failed[0].error}")
    return outcomes, stage.device.clock, whole_s


def _list_batches(stage: EncodeStage, run: EncodeRun) -> Iterator[tuple[str, Pass]]:
    """What the stage computes of a run whose tasks are committed, its inputs on the device."""
    store, config = Store.open(run.config.store_url), run.config
    assert config.features is not None, "it was checked"
    for item in run.items:
        record = RecordName(item.task.id, item.next_latents)
        commit = read_commit(store.storage, config.latents.folder, record)
        parts: tuple[Any, ...] = (
            stage.load_latents().open_part(item.task, generation=MAX_GENERATION),
            stage.load_features(config.features).open_part(commit, generation=MAX_GENERATION),
        )
        for part in parts:
            part.fetch()
            yield from ((found.stage, part.prepare_pass(found)) for found in part.read())
            part.abandon()


def _run_bare(
    batches: Sequence[_Batch], times: dict[str, list[float]], device: torch.device
) -> float:
    wait_for_device(device)
    started_s = time.perf_counter()
    spent: dict[str, float] = {}
    for found in batches:
        before_s = time.perf_counter()
        for start in range(0, found.work.num_rows, found.work.limit.num_rows):
            found.work.compute(slice(start, start + found.work.limit.num_rows))
        spent[found.stage] = spent.get(found.stage, 0.0) + time.perf_counter() - before_s
    wait_for_device(device)
    for stage, duration_s in spent.items():
        times.setdefault(stage, []).append(duration_s)
    return time.perf_counter() - started_s


def _describe_batches(
    batches: Sequence[_Batch], times: dict[str, list[float]]
) -> Iterator[BatchRow]:
    for stage, durations in times.items():
        found = [batch.work.num_rows for batch in batches if batch.stage == stage]
        yield BatchRow(stage, len(found), sum(found), min(durations) / len(found) * 1000)


def _count_row_flops(spec: Spec) -> dict[str, float]:
    """FLOPs of one row of each kind of batch, of blocks up to 10 at the UNet."""
    assert spec.features is not None, "it was checked"
    meta = torch.device("meta")
    options = ProfileOptions(
        size_px=spec.latents.size,
        batch=1,
        device=meta,
        head=None,
        compute=spec.features.compute,
        storage=spec.features.storage,
        repeats=1,
    )
    parts = count_parts(build_encode_batch(read_ldm_configs(spec.latents.model), options, meta))
    return {
        "vae": parts["VAE encoder"],
        "text": parts["text encoder"],
        "unet": sum(flops for part, flops in parts.items() if part.startswith("UNet")),
    }


def _measure_peak(device: torch.device, compute: str) -> float:
    """TFLOP a second of a large square matrix product, the best of some."""
    side = 8192 if device.type == "cuda" else 1536
    left, right = (
        torch.randn(side, side, device=device, dtype=COMPUTE_DTYPES[compute]) for _ in range(2)
    )
    best_s = float("inf")
    for _ in range(5):
        wait_for_device(device)
        started_s = time.perf_counter()
        left @ right
        wait_for_device(device)
        best_s = min(best_s, time.perf_counter() - started_s)
    return 2 * side**3 / best_s / 1e12
