"""Training on Ray Train: the same loop on every worker, and its progress followed from here."""

import json
import logging
import os
import signal
import threading
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer

from models.heads import HEADS
from pipeline.checkpoint import find_checkpoint, list_checkpoints, load_checkpoint
from pipeline.progress import Progress
from pipeline.ray_start import SPARE_CPUS, count_cores, count_gpus, ray_running
from pipeline.reader import Source, choose_layers
from pipeline.spec import SpecError
from pipeline.store import Store, create_snapshot, read_snapshot
from pipeline.train import METRICS, Worker, check_resumable, fit, open_readers
from pipeline.train_config import TrainConfig

logger = logging.getLogger(__name__)

FOLLOW_EVERY_S = 0.5


def run_train(
    config: TrainConfig, store_url: str, out: Path, *, num_workers: int | None, resume: bool
) -> Path:
    """Fit a head and return its last checkpoint's folder.

    ``num_workers`` is by default one a GPU, or 1 where there are none; 0 trains in this process,
    without Ray. ``out`` must be a folder that every worker sees.

    Raises:
        SpecError: the store lacks what the head reads, ``out`` holds another run, or there is
            nothing to resume.
    """
    out = out.absolute()
    _check_out(out, resume=resume)
    source = find_source(config, store_url, resume_from=out if resume else None)
    open_readers(config, source)  # fails here, before Ray starts, where the store lacks something
    out.mkdir(parents=True, exist_ok=True)
    first_step = 0
    if resume:
        record = load_checkpoint(out)[1]
        check_resumable(config, record)
        first_step = record.step
    with (
        Progress(
            "train",
            total=config.num_steps,
            unit="steps",
            metrics_path=out / METRICS,
            start=first_step,
        ) as progress,
        _Follower(out / METRICS, progress),
    ):
        if num_workers == 0:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            fit(config, source, out, Worker(0, 1, device), resume=resume)
        else:
            _train_on_ray(config, source, out, num_workers=num_workers, resume=resume)
    return find_checkpoint(out)


def _check_out(out: Path, *, resume: bool) -> None:
    if resume:
        find_checkpoint(out)
    elif list_checkpoints(out):
        raise SpecError(
            f"{out}: holds checkpoints of an earlier run; add --resume to go on from the last, "
            "or give another --out"
        )


def find_source(config: TrainConfig, store_url: str, *, resume_from: Path | None) -> Source:
    """Return the layers and the snapshot to read: the config's, a new one, or the resumed run's.

    Raises:
        SpecError: no layer fits, or the config's snapshot is not there or lacks a layer.
    """
    store = Store.open(store_url)
    if resume_from is not None:
        _, record = load_checkpoint(resume_from)
        earlier, _ = record.require_run()
        return Source(
            store,
            store.read_layer(record.latents.folder),
            store.read_layer(record.features.folder) if record.features else None,
            read_snapshot(store, earlier),
        )
    latents, features = choose_layers(
        store,
        latents=config.data.latents,
        features=config.data.features,
        reads_features="features" in HEADS[config.head.name].inputs,
    )
    folders = [layer.folder for layer in (latents, features) if layer is not None]
    pinned = config.data.snapshot
    if pinned is None:
        return Source(store, latents, features, create_snapshot(store, folders))
    snapshot = read_snapshot(store, pinned)
    missing = sorted(set(folders) - set(snapshot.records))
    if missing:
        raise SpecError(
            f"data.snapshot: {pinned} holds {', '.join(sorted(snapshot.records))}, without "
            f"{', '.join(missing)}, which this head reads; take a snapshot of every layer"
        )
    return Source(store, latents, features, snapshot)


def _train_on_ray(
    config: TrainConfig, source: Source, out: Path, *, num_workers: int | None, resume: bool
) -> None:
    num_cores = os.cpu_count() or 1
    with ray_running(num_cpus=num_cores + SPARE_CPUS):
        num_gpus = count_gpus()
        size = num_workers or num_gpus or 1
        use_gpu = num_gpus > 0
        if 0 < num_gpus < size:
            raise ValueError(
                f"--workers: expected at most {num_gpus}, the cluster's GPUs, got {size}"
            )
        cpus = max(1, count_cores() // size)
        scaling = ScalingConfig(
            num_workers=size,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": cpus} | ({"GPU": 1} if use_gpu else {}),
        )
        trainer = TorchTrainer(
            _train_worker,
            train_loop_config={
                "config": config,
                "source": source,
                "out": str(out),
                "resume": resume,
                "num_threads": cpus,
            },
            scaling_config=scaling,
            run_config=RunConfig(name="ray", storage_path=str(out)),
        )
        _fit_with_ray(trainer)


def _fit_with_ray(trainer: TorchTrainer) -> None:
    """Run a trainer; Ctrl-C stops its workers and comes out as KeyboardInterrupt.

    Ray Train puts a SIGINT handler in place that aborts the run and exits with status 0, and
    leaves it there.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit()
    except SystemExit as error:
        raise KeyboardInterrupt from error
    except TrainingFailedError as error:
        raise RuntimeError(f"a training worker failed: {_find_reason(error)}") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


def _find_reason(error: TrainingFailedError) -> str:
    """Return what the first worker to fail said, without Ray's traceback around it."""
    workers = getattr(error, "worker_failures", {})
    reason = next(iter(workers.values()), error)
    return str(reason).strip().rsplit("\n", 1)[-1]


def _train_worker(options: dict[str, Any]) -> None:
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(options["num_threads"])
    worker = Worker(context.get_world_rank(), context.get_world_size(), device)
    fit(
        options["config"], options["source"], Path(options["out"]), worker, resume=options["resume"]
    )


class _Follower:
    """Feeds a progress from the records that rank 0 appends to ``metrics.jsonl``."""

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
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # torn by a kill, or by two writers on one NFS file
                logger.info("%s: skipped a line that is not JSON", self._path)
                continue
            if "step" not in record:  # a line of the progress itself
                continue
            if "loss" in record:
                self._progress.update(
                    record["step"],
                    loss=round(record["loss"], 4),
                    pairs_per_s=round(record["pairs_per_s"], 1),
                    data_wait=round(record["data_wait"], 3),
                )
            elif "validation" in record:
                self._progress.update(
                    record["step"], IoU_FG=round(record["validation"]["IoU_FG"], 4)
                )
