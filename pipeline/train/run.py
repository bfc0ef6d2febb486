"""A training run, from its checks to its last checkpoint.

Data flow: config, store and ``OUT`` are checked -> ``OUT`` is locked, so that no other run writes
there -> the loop runs in this process or on Ray (``workers``), and the log that it writes is shown
as progress here.
"""

import json
import logging
import os
import threading
from pathlib import Path

from pipeline.base.machine import choose_device
from pipeline.base.outages import OutageError
from pipeline.base.progress import Progress
from pipeline.base.yaml import SpecError
from pipeline.read.source import Source, choose_layers, open_layers
from pipeline.runs.checkpoint import (
    RECORD,
    CheckpointRecord,
    find_checkpoint,
    find_resumable,
    list_checkpoints,
    read_record,
)
from pipeline.runs.config import TrainConfig
from pipeline.runs.lock import LOCKS, RunLock
from pipeline.runs.new_head import check_model
from pipeline.runs.resume import check_resumable
from pipeline.runs.step_folders import parse_step
from pipeline.runs.stop import StopRequest, asking_on_signals
from pipeline.store.snapshot import keep_snapshot
from pipeline.store.store import Store
from pipeline.train.data import Worker, check_readers
from pipeline.train.fit import fit
from pipeline.train.log import METRICS, read_steps
from pipeline.train.workers import MAX_FAILURES, train_on_ray

logger = logging.getLogger(__name__)

FOLLOW_EVERY_S = 0.5


def run_train(
    config: TrainConfig,
    store_url: str,
    out: Path,
    *,
    num_workers: int | None,
    resume: bool,
    max_failures: int = MAX_FAILURES,
) -> Path:
    """Train a head and return the folder of its last checkpoint.

    Args:
        num_workers: By default one for each GPU, or 1 without GPUs; 0 trains in this process,
            without Ray.
        out: A folder that every worker sees.
        max_failures: How many times the workers start again, from the last checkpoint, after one
            of them or its node was lost.

    Raises:
        SpecError: the store lacks what the head reads, ``out`` holds another run, or there is
            nothing to resume.
        RunHeldError: another run writes to ``out``.
        KeyboardInterrupt: SIGTERM, SIGINT or ``OUT/stop`` asked the run to end; it left a
            checkpoint of its last step.
    """
    out = out.absolute()
    source = None
    if not _check_out(out, resume=resume):  # before anything is written to ``out``
        source = _open_checked(config, store_url, out, None)
    request = StopRequest(out)
    with RunLock(out, "run"):
        request.clear()
        try:
            # Again: another run may have left a checkpoint while this one waited for the lock.
            record = find_resumable(out)[1] if _check_out(out, resume=resume) else None
            if record is not None and _is_finished(config, record):
                check_resumable(config, record)
                logger.warning(
                    "%s: the run is finished, at step %d; raise num_steps, %d now, to go on",
                    *(out, record.step, config.num_steps),
                )
                return find_checkpoint(out)
            if record is not None or source is None:
                source = _open_checked(config, store_url, out, record)
            keep_snapshot(source.store, source.snapshot, out)
            if resume and record is None:
                logger.warning(
                    "%s: its run ended before the first checkpoint; training from the start", out
                )
            path, start = out / METRICS, record.step if record else 0
            with (
                Progress(
                    "train", total=config.num_steps, unit="steps", metrics_path=path, start=start
                ) as progress,
                _Follower(path, progress),
            ):
                _train(config, source, out, num_workers, max_failures, request)
        finally:
            request.clear()
    return find_checkpoint(out)


def _train(
    config: TrainConfig,
    source: Source,
    out: Path,
    num_workers: int | None,
    max_failures: int,
    request: StopRequest,
) -> None:
    """Train here or on Ray; raise KeyboardInterrupt if the run was asked to end before its end."""
    try:
        if num_workers == 0:
            worker = Worker(0, 1, choose_device(None))
            resume = bool(list_checkpoints(out))
            with asking_on_signals(request):
                fit(config, source, out, worker, resume=resume, should_stop=request)
        else:
            train_on_ray(
                *(config, source, out),
                num_workers=num_workers,
                max_failures=max_failures,
                request=request,
            )
    except OutageError as error:
        if not request():
            raise
        raise KeyboardInterrupt from error  # the request ended the wait
    except FloatingPointError as error:
        raise FloatingPointError(f"{error}. {_describe_way_on(config, out, str(error))}") from error
    if not _is_finished(config, read_record(find_checkpoint(out))):
        raise KeyboardInterrupt


def _is_finished(config: TrainConfig, record: CheckpointRecord) -> bool:
    return record.step >= config.num_steps and not record.loop.get("unvalidated")


def _describe_way_on(config: TrainConfig, out: Path, error: str) -> str:
    """Say how a run that diverged goes on; ``error`` begins with the step that failed."""
    saved = list_checkpoints(out)
    what = "There is no checkpoint yet"
    if saved:
        what = f"The last checkpoint, {saved[-1].name}, is from before that and stays"
    if saved and error.startswith(f"step {parse_step(saved[-1]) + 1}:"):  # it is of its weights
        before = saved[-2].name if len(saved) > 1 else "the start"
        what = f"The weights of {saved[-1]} have diverged: remove it to go on from {before}"
    return (
        f"{what}. Lower learning_rate ({config.learning_rate:g}) or clip_norm "
        f"({config.clip_norm:g}), or change warmup_steps ({config.warmup_steps}), which then "
        "counts from where the run goes on; then the same command with --resume"
    )


def _check_out(out: Path, *, resume: bool) -> bool:
    """Return whether there is a checkpoint to resume from."""
    if (out / RECORD).is_file():
        raise SpecError(
            f"--out: {out} is itself a checkpoint; give the folder of its run, or another"
        )
    found = bool(list_checkpoints(out))
    if resume and not found and not (out / LOCKS).is_dir():
        raise SpecError(
            f"--resume: {out} {'holds no run' if out.exists() else 'is not there'}; leave "
            "--resume out to start one, or give the --out of the run"
        )
    if found and not resume:
        raise SpecError(
            f"{out}: holds checkpoints of an earlier run; add --resume to go on from the last, "
            "or give another --out"
        )
    return found


def _open_checked(
    config: TrainConfig, store_url: str, out: Path, record: CheckpointRecord | None
) -> Source:
    """Return what a run reads, after opening its readers once; ``record`` is what it resumes."""
    if record is not None:
        check_resumable(config, record)
    source = open_run_layers(config, store_url, resume_from=record, out=out)
    check_readers(config, source)
    return source


def open_run_layers(
    config: TrainConfig,
    store_url: str,
    *,
    resume_from: CheckpointRecord | None,
    out: Path | None = None,
) -> Source:
    """Return the layers and the snapshot to read: the config's, a new one, or the resumed run's.

    ``out`` is the run's folder, as of ``open_layers``.

    Raises:
        SpecError: no layer fits, or the config's snapshot is not there or lacks a layer.
        ModelFilesError: the head starts from a model whose folder is gone.
    """
    if resume_from is not None:
        earlier, _ = resume_from.require_run()
        return resume_from.open_layers(store_url, earlier, out=out)
    store, data = Store.open(store_url), config.data
    latents, features = choose_layers(
        store,
        latents=data.latents,
        features=data.features,
        reads_features=bool(config.head.blocks),
    )
    check_model(config.head, latents)  # before all the records are read
    source = open_layers(
        store,
        latents=latents.folder,
        features=features.folder if features else None,
        reads_features=features is not None,
        snapshot=data.snapshot,
        write=True,
        out=out,
    )
    source.snapshot.require(source.folders, option="data.snapshot", reader="this head")
    return source


class _Follower:
    """A thread that shows as progress the records that rank 0 appends to ``metrics.jsonl``."""

    def __init__(self, path: Path, progress: Progress) -> None:
        self._path = path
        self._progress = progress
        self._offset = path.stat().st_size if path.exists() else 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follow", daemon=True)

    def __enter__(self) -> "_Follower":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._read_new()

    def _follow(self) -> None:
        while not self._stop.wait(FOLLOW_EVERY_S):
            self._read_new()

    def _read_new(self) -> None:
        try:
            with self._path.open("rb") as file:
                if file.seek(0, os.SEEK_END) < self._offset:  # a resumed worker cut the log
                    self._offset = 0
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        for step, line in read_steps(whole):
            if step is None:
                continue
            record = json.loads(line)
            digits = {"loss": 4, "pairs_per_s": 1, "data_wait": 3}
            if "loss" in record:
                shown = {name: round(record[name], number) for name, number in digits.items()}
                self._progress.update(step, **shown)
            elif "validation" in record:
                self._progress.update(step, IoU_FG=round(record["validation"]["IoU_FG"], 4))
