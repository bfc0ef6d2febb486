"""``ldznet bench NAME``: the project's own benchmarks, each a table in Markdown or JSON.

Another benchmark is one more function here, with its name in ``BENCHMARKS``.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from jobs.bench_models import flops, parameters, profile, storage, tuning
from jobs.bench_table import AsJson, plain_rows, print_rows


def store(
    tasks: Annotated[
        str, typer.Option(help="Sizes, tasks each with a latents and a features record.")
    ] = "1000,10000,100000",
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Where the records are made; default: temporary.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """How listings, snapshots and inspect grow with tasks."""
    from pipeline.bench.store import measure_store

    sizes = _parse_sizes(tasks)
    with _scratch_folder(directory) as folder:
        print_rows(measure_store(folder, sizes), as_json)
    return 0


def write(
    gb: Annotated[float, typer.Option(min=0.01, help="Size of the task.")] = 2.0,
    directory: Annotated[
        Path | None, typer.Option("--dir", help="On the disk to measure; default: temporary.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of the writers.")] = 2,
    memory: Annotated[
        bool, typer.Option(help="Also the peak memory at 50, 500 and 2,000 rows.")
    ] = True,
    as_json: AsJson = False,
) -> int:
    """Speed of writing features beside dd, and memory."""
    from pipeline.bench.write import measure_memory, measure_write

    with _scratch_folder(directory) as folder:
        speeds = measure_write(folder, int(gb * 1e9), repeats=repeats)
        peaks = measure_memory(folder) if memory else []
    if as_json:
        typer.echo(json.dumps({"speed": plain_rows(speeds), "memory": plain_rows(peaks)}, indent=2))
        return 0
    print_rows(speeds, as_json)
    if peaks:
        typer.echo("\nPeak memory of a process that writes one block's features:\n")
        print_rows(peaks, as_json)
    return 0


def encode(
    model: Annotated[
        str | None,
        typer.Option(help="A diffusers folder; sd14: SD 1.4's size; default: tiny; both random."),
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Option(help="Tars, as encode's --corpus; repeatable. Default: the demo's scenes."),
    ] = None,
    num: Annotated[int, typer.Option(min=1, help="Scenes, where no tars are given.")] = 96,
    tars: Annotated[int, typer.Option(min=1, help="Tars that they are in.")] = 4,
    size: Annotated[int, typer.Option(help="Side of a view in px, a multiple of 64.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Rows a pass.")] = 16,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of the model.")] = 1,
    decoders: Annotated[int, typer.Option(min=1, help="Processes that decode images.")] = 1,
    compute: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    turns: Annotated[int, typer.Option(min=1, help="Turns of the stage and the bare loop.")] = 3,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="As encode's.")] = False,
    compile_blocks: Annotated[bool, typer.Option("--compile", help="As encode's.")] = False,
    directory: Annotated[
        Path | None, typer.Option("--dir", help="On the disk to write to; default: temporary.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """The encode stage beside a bare loop over the same batches."""
    from models.ldm.tuning import Tuning
    from pipeline.base.machine import check_measured, choose_device
    from pipeline.base.yaml import validate
    from pipeline.bench.encode import measure_encode
    from pipeline.bench.models import write_random_model
    from pipeline.scenes.scene import write_corpus
    from pipeline.spec.fields import Spec

    check_measured("bench encode", size_px=size, device=choose_device(None))
    with _scratch_folder(directory) as folder:
        if model in (None, "sd14"):
            write_random_model(folder / "ldm", sd14=model == "sd14", size_px=128)
        if not images:
            per_tar = -(-num // tars)
            write_corpus(folder, split="val", num_images=num, images_per_tar=per_tar, size_px=size)
        name = str(folder / "ldm") if model in (None, "sd14") else model
        sections = {
            "latents": {"model": name, "size": size, "compute": compute},
            "features": {"compute": compute},
        }
        found = measure_encode(
            validate(sections, Spec, where="bench encode"),
            images or [str(folder / "*.tar")],
            folder,
            batch=batch,
            num_threads=threads,
            num_decoders=decoders,
            turns=turns,
            tuning=Tuning(channels_last=channels_last, compile=compile_blocks),
        )
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
        return 0
    for rows in (found.batches, found.turns, [found.speed]):
        print_rows(rows, as_json)
        typer.echo("")
    typer.echo(f"device busy {found.busy:.3f}, of the bare loop {found.of_bare_loop:.3f}")
    return 0


def tasks(
    tasks: Annotated[
        str, typer.Option(help="Numbers of tasks that do nothing.")
    ] = "100,1000,10000",
    actors: Annotated[int, typer.Option(min=1, help="Actors.")] = 4,
    as_json: AsJson = False,
) -> int:
    """The driver's memory and time a task of an encode run."""
    from pipeline.bench.tasks import measure_tasks

    print_rows(measure_tasks(_parse_sizes(tasks), num_actors=actors), as_json)
    return 0


def reader(
    url: Annotated[
        str | None, typer.Option(help="s3://bucket/prefix to measure in place of a local disk.")
    ] = None,
    workers: Annotated[str, typer.Option(help="Numbers of loader processes.")] = "1,2,4,8",
    directory: Annotated[
        Path | None, typer.Option("--dir", help="On the disk to measure; default: temporary.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Speed of reading random pairs beside its peers."""
    from pipeline.bench.reader import measure_objects, measure_reader, measure_workers

    if url is not None:
        print_rows(measure_objects(url), as_json)
        return 0
    with _scratch_folder(directory) as folder:
        rows = measure_reader(folder)
        print_rows(rows + measure_workers(folder, _parse_sizes(workers)), as_json)
    return 0


def train(
    store: Annotated[
        str | None,
        typer.Option(help="A store with images and features; default: drawn scenes, encoded."),
    ] = None,
    head: Annotated[
        list[str] | None, typer.Option(help="Repeatable. Default: probe, znet, ldznet.")
    ] = None,
    num: Annotated[int, typer.Option(min=2, help="Training scenes, where no store is given.")] = 64,
    size: Annotated[int, typer.Option(help="Side of a view in px, a multiple of 64.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Pairs a step.")] = 16,
    loader_workers: Annotated[int, typer.Option(min=1, help="Threads that read ahead.")] = 2,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of the head.")] = None,
    turns: Annotated[int, typer.Option(min=1, help="Turns of the two epochs.")] = 3,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:1; default cuda where there is one.")
    ] = None,
    directory: Annotated[
        Path | None, typer.Option("--dir", help="On the disk to read from; default: temporary.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """An epoch from the store beside one that recomputes its inputs."""
    import torch

    from pipeline.base.machine import check_measured, choose_device
    from pipeline.base.yaml import validate
    from pipeline.bench.train import measure_train, write_train_store
    from pipeline.read.source import open_layers
    from pipeline.runs.config import TrainConfig

    chosen = choose_device(device)
    check_measured("bench train", size_px=size, device=chosen)
    if threads is not None:
        torch.set_num_threads(threads)
    heads = head or ["probe", "znet", "ldznet"]
    plain = {
        "head": {"name": heads[0]},
        "num_steps": 1,
        "batch_size": batch,
        "loader_workers": loader_workers,
    }
    config = validate(plain, TrainConfig, where="bench train")
    with _scratch_folder(directory) as folder:
        url = store or write_train_store(folder, num=num, size_px=size)
        source = open_layers(url)
        print_rows(measure_train(config, source, heads=heads, device=chosen, turns=turns), as_json)
    return 0


BENCHMARKS: tuple[Callable[..., int], ...] = (
    flops,
    parameters,
    storage,
    profile,
    tuning,
    store,
    write,
    encode,
    tasks,
    reader,
    train,
)


def _parse_sizes(text: str) -> list[int]:
    sizes = [int(part) if part.isdecimal() else 0 for part in text.split(",")]
    if min(sizes) < 1:
        raise typer.BadParameter(f"expected sizes such as 1000,10000, got {text!r}")
    return sizes


@contextmanager
def _scratch_folder(parent: Path | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ldznet-bench-", dir=parent) as name:
        yield Path(name)


def build_app(wrap: Callable[[Callable[..., int]], Callable[..., None]]) -> typer.Typer:
    """Build the commands under ``bench``; ``wrap`` turns a returned status into an exit."""
    app = typer.Typer(
        help="The project's own benchmarks.", no_args_is_help=True, rich_markup_mode=None
    )
    for benchmark in BENCHMARKS:
        app.command(benchmark.__name__)(wrap(benchmark))
    return app
