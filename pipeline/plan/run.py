"""Forecasts what encoding a corpus will store, take and cost.

Data flow: tasks -> a sample of them (``sample``) -> the real encode stage over it, timed
(``timing``) -> counts and bytes of the corpus (``counts``) -> hours (``cost``) -> steps of the real
heads, timed, and their epochs (``epochs``) -> a forecast.

Only scratch folders are written; they are removed at the end.
"""

import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

import torch

from models.ldm.tuning import PLAIN, Tuning
from pipeline.base.machine import describe_machine
from pipeline.base.ray_cluster import NodeSize
from pipeline.base.yaml import SpecError
from pipeline.corpus.tasks import Task, list_tasks, split_tasks
from pipeline.encode.actor_pool import ActorBounds
from pipeline.encode.run import choose_workers
from pipeline.plan.cost import EncodeCost, Machines, cost_encoding
from pipeline.plan.counts import CorpusCounter
from pipeline.plan.epochs import add_heads, forecast_head, open_reader, time_head
from pipeline.plan.estimate import Estimate
from pipeline.plan.forecast import FileForecast, Forecast, HeadForecast
from pipeline.plan.sample import TarSurvey, sample_corpus
from pipeline.plan.timing import NUM_PASSES, time_encoding
from pipeline.read.source import open_layers
from pipeline.runs.config import TrainConfig
from pipeline.spec.check import check_spec
from pipeline.spec.fields import DEFAULT_SPLIT_BYTES, Spec
from pipeline.stage.encode_stage import MAX_IN_FLIGHT
from pipeline.storage.interface import remove_leftovers
from pipeline.storage.open import open_storage

MIN_SAMPLES = 64
START_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class PlanOptions:
    """What is planned: the arguments of the command."""

    corpus: tuple[str, ...]
    spec: Spec
    heads: tuple[TrainConfig, ...]
    spec_name: str = "spec"  # in errors, such as its file
    required: bool = True  # whether a head that the layers cannot feed is an error, or left out
    store: str | None = None  # whose storage is timed; None: the folder for temporary files
    root: str | None = None
    price: float | None = None  # dollars an hour of one GPU
    actors: ActorBounds | None = None  # its maximum is planned; None: what this machine holds
    num_threads: int | None = None  # of an actor, as the next two
    num_decoders: int | None = None
    num_gpus: float | None = None
    split_bytes: int = DEFAULT_SPLIT_BYTES
    batch: int = 16
    num_samples: int | None = None  # None: enough for as many full batches as tars in flight
    epochs: int | None = None
    seed: int = 0
    tuning: Tuning = PLAIN


def make_plan(options: PlanOptions, *, say: Callable[[str], None]) -> Forecast:
    """Sample, time and forecast; ``say`` is called with what starts now.

    Raises:
        SpecError, ModelFilesError, CorpusError: the spec, the model or the corpus is not valid, or
            a required head cannot read the layers.
        OSError: a tar cannot be read, or a scratch folder cannot be written.
        RuntimeError: the sample could not be encoded.
    """
    say("checking the spec against its model")
    check_spec(options.spec, where=options.spec_name)
    check_gpus(options.num_gpus, on_gpu=torch.cuda.is_available())
    say("listing tars")
    tasks = split_tasks(list_tasks(options.corpus, root=options.root), options.split_bytes)
    machines = choose_machines(options, len(tasks))
    say(f"looking into some of {len(tasks):,} tasks")
    num_samples = options.num_samples or max(MIN_SAMPLES, MAX_IN_FLIGHT * options.batch)
    surveys, samples = sample_corpus(
        tasks, options.spec.latents, num_samples=num_samples, seed=options.seed
    )
    if options.actors is None or options.actors.max:
        say("starting a worker's process, to time it")
        machines = replace(machines, start_s=measure_start())
    before = torch.get_num_threads()
    with (
        tempfile.TemporaryDirectory(prefix="ldznet-plan-") as folder,
        scratch_store(options.store) as store_url,
    ):
        timing = time_encoding(
            options.spec,
            samples,
            folder=Path(folder),
            store_url=store_url,
            batch=options.batch,
            num_threads=machines.num_threads,
            num_decoders=machines.num_decoders,
            tuning=options.tuning,
            say=say,
        )
        torch.set_num_threads(before)  # training has the cores to itself
        counts = CorpusCounter(
            options.spec, tasks, surveys, timing, num_actors=machines.num_actors
        ).count()
        cost = cost_encoding(counts, timing, machines)
        heads, left_out = _forecast_heads(options, tasks, cost, say)
    return Forecast(
        facts=_describe(options, tasks, surveys, cost),
        counts={name: counts.rows[name] for name in _COUNTS}
        | {"damaged tasks": counts.num_damaged},
        rejects=counts.rejects,
        files=[FileForecast(*key, size) for key, size in sorted(counts.files.items())],
        times={
            "steady_s": cost.steady_s,
            "start_s": Estimate.exact(cost.start_s),
            "wall_s": cost.wall_s,
            "machine_s": cost.machine_s,
            "cpu_s": cost.cpu_s,
            **{f"busy_{stage}_s": found for stage, found in cost.busy_s.items()},
        },
        dollars=None if options.price is None else cost.machine_s.scaled(options.price / 3600),
        heads=heads,
        left_out=left_out,
    )


_COUNTS = ("stored", "set_aside", "views", "pairs", "masks", "prompts", "draws", "bytes")


def check_gpus(num_gpus: float | None, *, on_gpu: bool) -> None:
    """Raise ValueError for ``--gpus`` that this machine, which is the one timed, does not have."""
    if num_gpus is not None and (num_gpus > 0) != on_gpu:
        there = "a GPU" if on_gpu else "none"
        raise ValueError(
            f"--gpus: expected what this machine has, for plan times it: {there}, got "
            f"{num_gpus:g}; plan on a machine like the workers, or hide its GPUs by "
            "CUDA_VISIBLE_DEVICES="
        )


def choose_machines(options: PlanOptions, num_tasks: int) -> Machines:
    """Return the actors that ``encode`` would choose on such nodes; ValueError if too small."""
    on_gpu = torch.cuda.is_available()
    num_cores = os.cpu_count() or 1
    if options.actors is not None and options.actors.max == 0:
        decoders = options.num_decoders or 1
        return Machines(on_gpu, 1, num_cores, 0.0, 1.0, options.num_threads, decoders)
    workers = choose_workers(
        [NodeSize(num_cores, torch.cuda.device_count() if on_gpu else 0)],
        num_tasks=num_tasks,
        bounds=options.actors,
        num_threads=options.num_threads,
        num_decoders=options.num_decoders,
        num_gpus=options.num_gpus,
    )
    gpus = workers.num_gpus or 1.0
    return Machines(
        on_gpu, workers.bounds.max, num_cores, 0.0, gpus, workers.num_threads, workers.num_decoders
    )


def measure_start() -> float:
    """Return the seconds that a new process takes to import what an actor runs."""
    start_s = time.monotonic()
    subprocess.run(
        [sys.executable, "-c", "import pipeline.encode.run"],
        cwd=Path(__file__).parents[2],
        timeout=START_TIMEOUT_S,
        check=True,
        capture_output=True,
    )
    return time.monotonic() - start_s


@contextmanager
def scratch_store(beside: str | None) -> Iterator[str]:
    """Yield the URL of a temporary store, on the same storage as the user's."""
    if beside is not None and urlsplit(beside).scheme == "s3":
        url = f"{beside.rstrip('/')}-plan-{secrets.token_hex(8)}"
        storage = open_storage(url)
        try:
            yield url
        finally:
            for name in list(storage.list_names()):
                remove_leftovers(storage, name)
        return
    parent = None
    if beside is not None:
        path = Path(urlsplit(open_storage(beside).url).path)
        parent = next(folder for folder in path.absolute().parents if folder.is_dir())
    with tempfile.TemporaryDirectory(prefix="ldznet-plan-", dir=parent) as folder:
        yield str(Path(folder) / "store")


def _forecast_heads(
    options: PlanOptions, tasks: Sequence[Task], cost: EncodeCost, say: Callable[[str], None]
) -> tuple[list[HeadForecast], dict[str, str]]:
    timing = cost.timing
    source = open_layers(
        timing.store_url,
        latents=timing.latents.folder,
        features=timing.features.folder if timing.features else None,
        reads_features=timing.features is not None,
    )
    heads: list[HeadForecast] = []
    left_out: dict[str, str] = {}
    for config in options.heads:
        try:
            reader = open_reader(config.head, source)
        except SpecError as error:
            if options.required:
                raise
            left_out[config.head.name] = str(error)
            continue
        step_s, read_s = time_head(config, source, reader, cost.machines.device, say=say)
        heads.append(
            forecast_head(
                config, step_s=step_s, read_s=read_s, tasks=tasks, cost=cost, epochs=options.epochs
            )
        )
    if len(heads) > 1:
        heads.append(add_heads(heads))
    return heads, left_out


def _describe(
    options: PlanOptions, tasks: Sequence[Task], surveys: Sequence[TarSurvey], cost: EncodeCost
) -> dict[str, str | int | float]:
    timing, machines = cost.timing, cost.machines
    return {
        **{x.kind: x.folder for x in (timing.latents, timing.features) if x is not None},
        "model": str(timing.latents.source["model"]),
        "tars": len({task.url for task in tasks}),
        "tasks": len(tasks),
        "corpus_bytes": int(sum({task.url: task.num_bytes for task in tasks}.values())),
        "sampled_tasks": len(surveys),
        "read_bytes": sum(survey.task.num_bytes for survey in surveys),
        "timed_images": round(timing.rows["samples"] / NUM_PASSES),
        "seed": options.seed,
        "storage": options.store or "the folder for temporary files",
        "kind": "GPU" if machines.on_gpu else "machine",
        "actors": machines.num_actors,
        "gpus_an_actor": machines.num_gpus if machines.on_gpu else 0,
        "threads_an_actor": machines.num_threads or torch.get_num_threads(),
        "decoders_an_actor": machines.num_decoders,
        "batch": options.batch,
        "pace_set_by": cost.slowest,
        **describe_machine(machines.device),
    }
