"""``ldznet bench NAME``: the project's own benchmarks, each a table in Markdown or JSON.

``bench NAME`` calls pipeline/bench/NAME.py. Another benchmark is one more function here, with its
name in ``BENCHMARKS``.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs import options
from jobs.blocks import blocks

if TYPE_CHECKING:  # it imports torch, which --help must not wait for
    import torch


def flops(
    model: options.UNetModel = "sd14", size: options.SizePx = 384, as_json: options.AsJson = False
) -> int:
    """FLOPs of a UNet up to each of its blocks."""
    return blocks(model, size=size, as_json=as_json)


def parameters(model: options.UNetModel = "sd14", as_json: options.AsJson = False) -> int:
    """Number of parameters of a UNet and of every head built from it."""
    from pipeline.bench.parameters import count_parameters
    from pipeline.spec.blocks import read_unet_config

    print_rows(count_parameters(read_unet_config(model)), as_json)
    return 0


def storage(
    model: options.RandomModel = None,
    images: options.Images = None,
    num: Annotated[int, typer.Option(min=1, help="Number of views.")] = 16,
    size: options.SizePx = 128,
    block: Annotated[
        list[int] | None, typer.Option(help="A block's number; repeatable. Default: 6 to 10.")
    ] = None,
    as_json: options.AsJson = False,
) -> int:
    """Error of features as float16, int8 and 4 bits, by block."""
    from models.heads.options import PAPER_BLOCKS
    from pipeline.bench.inputs import prepare_model, write_scenes
    from pipeline.bench.storage import measure_storage, read_views
    from pipeline.spec.fields import LatentsSpec

    _choose_device("storage", size)
    with _scratch_folder(None) as folder:
        ldm = prepare_model(model, folder / "ldm")
        patterns = images or write_scenes(folder, num=num, num_tars=1, size_px=size)
        views = read_views(patterns, LatentsSpec(model=str(ldm), size=size), num=num)
        print_rows(measure_storage(ldm, views, blocks=block or PAPER_BLOCKS), as_json)
    return 0


def profile(
    model: options.UNetModel,
    head: Annotated[
        str, typer.Option(help="The head whose training step is measured; none: encoding alone.")
    ] = "ldznet",
    size: options.SizePx = 384,
    batch: options.Batch = 1,
    device: options.Device = None,
    compute: Annotated[
        str,
        typer.Option(
            help="float32, bfloat16 or float16: the dtype of encoding. A training step is in "
            "float32; with the two others it is under bfloat16 autocast."
        ),
    ] = "float32",
    repeats: Annotated[int, typer.Option(min=1, help="Measured batches, after a warm-up.")] = 3,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    as_json: options.AsJson = False,
) -> int:
    """Where the time of an encode batch and of a training step goes."""
    import torch

    from pipeline.base.machine import choose_device, describe_machine
    from pipeline.bench.profile import ProfileOptions, profile_model, read_ldm_configs

    if threads is not None:
        torch.set_num_threads(threads)
    chosen = choose_device(device)
    named = None if head == "none" else head
    asked = ProfileOptions(size, batch, chosen, named, compute, repeats)
    rows, times = profile_model(read_ldm_configs(model), asked)
    machine = describe_machine(chosen)
    if as_json:
        found = {"machine": machine, "parts": _plain(rows), "stages": _plain(times)}
        typer.echo(json.dumps(found, indent=2))
        return 0
    print_rows(rows)
    typer.echo("\nThe whole stage, timed without waiting for the device after each part:\n")
    print_rows(times)
    typer.echo("\n" + ", ".join(f"{key} {value}" for key, value in machine.items()))
    return 0


def tuning(
    model: options.RandomModel = None,
    size: options.SizePx = 128,
    batch: Annotated[int, typer.Option(min=2, help="Rows.")] = 8,
    device: options.Device = None,
    as_json: options.AsJson = False,
) -> int:
    """Deviation and time of encode's run options and precisions."""
    from models.heads.options import PAPER_BLOCKS
    from pipeline.base.machine import choose_device
    from pipeline.bench.tuning import measure_tuning

    chosen = choose_device(device)
    rows = measure_tuning(model, blocks=PAPER_BLOCKS, size_px=size, batch=batch, device=chosen)
    print_rows(rows, as_json)
    return 0


def store(
    tasks: Annotated[
        str, typer.Option(help="Numbers of tasks, each with a latents and a features record.")
    ] = "1000,10000,100000",
    directory: options.ScratchParent = None,
    as_json: options.AsJson = False,
) -> int:
    """How listings, snapshots and inspect grow with tasks."""
    from pipeline.bench.store import measure_store

    sizes = _parse_numbers(tasks)
    with _scratch_folder(directory) as folder:
        print_rows(measure_store(folder, sizes), as_json)
    return 0


def write(
    gb: Annotated[float, typer.Option(min=0.01, help="Size of the task written.")] = 2.0,
    directory: options.ScratchParent = None,
    repeats: options.Turns = 2,
    as_json: options.AsJson = False,
) -> int:
    """Speed of writing features, compared with dd."""
    from pipeline.bench.write import measure_write

    with _scratch_folder(directory) as folder:
        print_rows(measure_write(folder, int(gb * 1e9), repeats=repeats), as_json)
    return 0


def encode(
    model: options.RandomModel = None,
    images: options.Images = None,
    num: Annotated[int, typer.Option(min=1, help="Scenes, where no tars are given.")] = 96,
    tars: Annotated[int, typer.Option(min=1, help="Number of tars that hold the scenes.")] = 4,
    size: options.SizePx = 256,
    batch: options.Batch = 16,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of the model.")] = 1,
    decoders: Annotated[int, typer.Option(min=1, help="Processes that decode images.")] = 1,
    compute: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    turns: options.Turns = 3,
    channels_last: options.ChannelsLast = False,
    compile_blocks: options.CompileBlocks = False,
    directory: options.ScratchParent = None,
    as_json: options.AsJson = False,
) -> int:
    """The encode stage, compared with a bare loop."""
    from models.ldm.tuning import Tuning
    from pipeline.base.yaml import validate
    from pipeline.bench.encode import measure_encode
    from pipeline.bench.inputs import prepare_model, write_scenes
    from pipeline.spec.fields import Spec

    _choose_device("encode", size)
    with _scratch_folder(directory) as folder:
        ldm = str(prepare_model(model, folder / "ldm"))
        sections = {
            "latents": {"model": ldm, "size": size, "compute": compute},
            "features": {"compute": compute},
        }
        rows = measure_encode(
            validate(sections, Spec, where="bench encode"),
            images or write_scenes(folder, num=num, num_tars=tars, size_px=size),
            folder,
            batch=batch,
            num_threads=threads,
            num_decoders=decoders,
            turns=turns,
            tuning=Tuning(channels_last=channels_last, compile=compile_blocks),
        )
    print_rows(rows, as_json)
    if not as_json:
        busy, ratio = median(row.busy for row in rows), median(row.of_bare_loop for row in rows)
        typer.echo(f"\ndevice busy {busy:.3f}, of the bare loop {ratio:.3f}")
    return 0


def tasks(
    tasks: Annotated[
        str, typer.Option(help="Numbers of tasks; none of them does any work.")
    ] = "100,1000,10000",
    actors: Annotated[int, typer.Option(min=1, help="Number of actors.")] = 4,
    as_json: options.AsJson = False,
) -> int:
    """Time and memory of an encode run's driver, a task."""
    from pipeline.bench.tasks import measure_tasks

    print_rows(measure_tasks(_parse_numbers(tasks), num_actors=actors), as_json)
    return 0


def reader(
    url: Annotated[
        str | None, typer.Option(help="Measure s3://bucket/prefix instead of a local disk.")
    ] = None,
    directory: options.ScratchParent = None,
    as_json: options.AsJson = False,
) -> int:
    """Speed of reading random pairs, compared with other readers."""
    from pipeline.bench.reader import measure_objects, measure_reader

    if url is not None:
        print_rows(measure_objects(url), as_json)
        return 0
    with _scratch_folder(directory) as folder:
        print_rows(measure_reader(folder), as_json)
    return 0


def train(
    store: Annotated[
        str | None,
        typer.Option(help="A store with images and features; default: scenes, encoded here."),
    ] = None,
    head: Annotated[
        list[str] | None, typer.Option(help="Repeatable. Default: probe, znet, ldznet.")
    ] = None,
    num: Annotated[int, typer.Option(min=2, help="Training scenes, where no store is given.")] = 64,
    size: options.SizePx = 128,
    batch: Annotated[int, typer.Option(min=1, help="Pairs in one step.")] = 16,
    loader_workers: Annotated[int, typer.Option(min=1, help="Threads that read ahead.")] = 2,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of the head.")] = None,
    turns: options.Turns = 3,
    device: options.Device = None,
    directory: options.ScratchParent = None,
    as_json: options.AsJson = False,
) -> int:
    """An epoch from the store, and one that computes its inputs."""
    import torch

    from pipeline.base.yaml import validate
    from pipeline.bench.train import measure_train, write_train_store
    from pipeline.read.source import open_layers
    from pipeline.runs.config import TrainConfig

    chosen = _choose_device("train", size, device)
    if threads is not None:
        torch.set_num_threads(threads)
    heads = head or ["probe", "znet", "ldznet"]
    plain = {"head": {"name": heads[0]}, "num_steps": 1, "batch_size": batch}
    plain["loader_workers"] = loader_workers
    config = validate(plain, TrainConfig, where="bench train")
    with _scratch_folder(directory) as folder:
        source = open_layers(store or write_train_store(folder, num=num, size_px=size))
        print_rows(measure_train(config, source, heads=heads, device=chosen, turns=turns), as_json)
    return 0


BENCHMARKS: tuple[Callable[..., int], ...] = (
    *(flops, parameters, storage, profile, tuning),
    *(store, write, encode, tasks, reader, train),
)


def print_rows(rows: Sequence[Any], as_json: bool = False) -> None:
    """Print instances of a dataclass, one a row."""
    from pipeline.report.markdown import format_table

    plain = _plain(rows)
    typer.echo(json.dumps(plain, indent=2) if as_json else format_table(plain))


def _plain(rows: Sequence[Any]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def _choose_device(benchmark: str, size_px: int, name: str | None = None) -> "torch.device":
    """Return the device; refuse one, or a size, that the benchmark cannot run with."""
    from pipeline.base.machine import check_measured, choose_device

    device = choose_device(name)
    check_measured(f"bench {benchmark}", size_px=size_px, device=device)
    return device


def _parse_numbers(text: str) -> list[int]:
    numbers = [int(part) if part.isdecimal() else 0 for part in text.split(",")]
    if min(numbers) < 1:
        raise typer.BadParameter(f"expected numbers such as 1000,10000, got {text!r}")
    return numbers


@contextmanager
def _scratch_folder(parent: Path | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ldznet-bench-", dir=parent) as name:
        yield Path(name)


def build_app(wrap: Callable[[Callable[..., int]], Callable[..., None]]) -> typer.Typer:
    """Build the commands under ``bench``; ``wrap`` turns a returned status into an exit."""
    app = typer.Typer(
        help="Run the project's own benchmarks.", no_args_is_help=True, rich_markup_mode=None
    )
    for benchmark in BENCHMARKS:
        app.command(benchmark.__name__)(wrap(benchmark))
    return app
