"""How near the encode stage comes to a device that never waits.

The real stage encodes a corpus into a scratch store. A bare loop computes the same batches again
from memory, without input or output. The two take turns in one run. Prompts are encoded anew for
each tar, so that both sides do the same work.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from models.ldm.tuning import Tuning
from pipeline.base.machine import wait_for_device
from pipeline.encode.prepare import EncodeRun, prepare_encode
from pipeline.spec.fields import Spec
from pipeline.stage.device import BusyTime, Pass
from pipeline.stage.encode_stage import EncodeStage
from pipeline.stage.features import FeaturesEncoding
from pipeline.stage.latents import LatentsEncoding
from pipeline.stage.work import EncodeConfig, TaskOutcome
from pipeline.store.commit import RecordName, read_commit
from pipeline.store.prompt_cache import PromptCache
from pipeline.store.store import Store

MAX_GENERATION = 9999  # of encodings that are never committed


@dataclass(frozen=True, slots=True)
class TurnRow:
    """One turn of the bare loop and of the stage.

    ``span_s`` is from the start of the stage's first batch to the end of its last one, ``whole_s``
    from the opening of the first tar to the last commit. ``busy`` is the share of the span in which
    the device worked, ``of_bare_loop`` the bare loop's time over the span. The last three are what
    the stage did in a second of the span.
    """

    turn: int
    bare_s: float
    span_s: float
    whole_s: float
    busy: float
    of_bare_loop: float
    images_a_s: float
    draws_a_s: float
    written_mb_a_s: float


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
) -> list[TurnRow]:
    """Encode a corpus into stores below ``folder`` and compare with a bare loop, in turns.

    One turn before the first warms up. The batches stay in memory: choose a corpus that fits.

    Raises:
        ValueError: the spec has no features section, or a task failed.
    """
    if spec.features is None:
        raise ValueError("bench encode: expected a spec with a features section, got none")

    def prepare(name: str) -> EncodeRun:
        run = prepare_encode(spec, patterns, str(folder / name), batch=batch, tuning=tuning)
        config = replace(run.config, num_threads=num_threads, num_decoders=num_decoders)
        return replace(run, config=config)

    run = prepare("warm")
    with closing(_open_stage(run.config)) as stage:
        outcomes, *_ = _encode(stage, run)
        batches = list(_list_batches(stage, run))
    num_images = sum(outcome.num_samples for outcome in outcomes)
    num_draws = sum(work.num_rows for name, work in batches if name == "unet")
    written_mb = sum(outcome.num_bytes for outcome in outcomes) / 1e6
    rows = []
    for turn in range(turns):
        bare_s = _run_bare([work for _, work in batches], stage.device.torch_device)
        run = prepare(str(turn))
        with closing(_open_stage(run.config)) as stage:
            _, device, whole_s = _encode(stage, run)
        span_s = device.last_s - device.first_s
        shares = (device.busy_s / span_s, bare_s / span_s)
        speeds = (num_images / span_s, num_draws / span_s, written_mb / span_s)
        rows.append(TurnRow(turn, bare_s, span_s, whole_s, *shares, *speeds))
    return rows


def _open_stage(config: EncodeConfig) -> EncodeStage:
    """Return a stage with its models loaded, its decoders running, no prompt kept between tars."""
    stage = EncodeStage(config)
    stage.load_latents().prompts = PromptCache(max_bytes=0)
    stage.load_features()
    return stage


def _encode(stage: EncodeStage, run: EncodeRun) -> tuple[list[TaskOutcome], BusyTime, float]:
    stage.device.busy = BusyTime()
    started_s = time.perf_counter()
    outcomes = [future.result() for future in [stage.submit(item) for item in run.items]]
    whole_s = time.perf_counter() - started_s
    if failed := [outcome for outcome in outcomes if outcome.status != "committed"]:
        raise ValueError(f"bench encode: {failed[0].task} {failed[0].status}: {failed[0].error}")
    return outcomes, stage.device.busy, whole_s


def _list_batches(stage: EncodeStage, run: EncodeRun) -> Iterator[tuple[str, Pass]]:
    """Yield the stage and the inputs, on the device, of every batch of a run that is committed."""
    store, config = Store.open(run.config.store_url), run.config
    for item in run.items:
        record = RecordName(item.task.id, item.next_latents)
        commit = read_commit(store.storage, config.latents.folder, record)
        encodings: tuple[Any, ...] = (
            LatentsEncoding(stage.load_latents(), replace(item, next_latents=MAX_GENERATION), None),
            FeaturesEncoding(stage.load_features(), commit, generation=MAX_GENERATION),
        )
        for encoding in encodings:
            encoding.fetch()
            yield from ((found.stage, encoding.build_pass(found)) for found in encoding.read())
            encoding.abandon()


def _run_bare(batches: Sequence[Pass], device: torch.device) -> float:
    """Compute all batches; return the seconds."""
    wait_for_device(device)
    started_s = time.perf_counter()
    for batch in batches:
        for start in range(0, batch.num_rows, batch.limit.num_rows):
            batch.compute(slice(start, start + batch.limit.num_rows))
    wait_for_device(device)
    return time.perf_counter() - started_s
