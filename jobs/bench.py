"""``ldznet bench NAME``: the project's own benchmarks, each a table in Markdown or JSON.

Another benchmark is one more function here, with its name in ``BENCHMARKS``.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.blocks import blocks

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
UNetModel = Annotated[
    str, typer.Option(help="A diffusers folder or hub id; sd14: SD 1.4's config, built in.")
]


def flops(
    model: UNetModel = "sd14",
    size: Annotated[int, typer.Option(help="Side of a view in px, a multiple of 64.")] = 384,
    as_json: AsJson = False,
) -> int:
    """FLOPs of the UNet up to each block."""
    return blocks(model, size=size, as_json=as_json)


def parameters(model: UNetModel = "sd14", as_json: AsJson = False) -> int:
    """Parameters of the UNet and of every head."""
    from pipeline.bench_models import count_parameters
    from pipeline.list_blocks import read_unet_config

    _print(count_parameters(read_unet_config(model)), as_json)
    return 0


def storage(
    model: Annotated[
        str | None,
        typer.Option(help="A diffusers folder or hub id; default: the demo's tiny one."),
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Option(help="Tars, as encode's --corpus; repeatable. Default: the demo's scenes."),
    ] = None,
    num: Annotated[int, typer.Option(min=1, help="Views.")] = 16,
    size: Annotated[int, typer.Option(help="Side of a view in px, a multiple of 64.")] = 128,
    block: Annotated[
        list[int] | None, typer.Option(help="Block; repeatable. Default: 6 to 10.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Error of float16, int8 and 4 bits, by block."""
    from models.ldznet import PAPER_BLOCKS
    from pipeline.bench_models import (
        measure_storage,
        read_views,
        write_demo_model,
        write_demo_scenes,
    )
    from pipeline.fetch_model import fetch_model
    from pipeline.meter import check_measured, choose_device
    from pipeline.spec import LatentsSpec

    check_measured("bench storage", size_px=size, device=choose_device(None))
    spec = LatentsSpec(model=model or "demo", size=size)
    with tempfile.TemporaryDirectory(prefix="ldznet-bench-") as name:
        folder = Path(name) / "ldm"
        if model is None:
            write_demo_model(folder, size_px=128)
        else:
            folder = fetch_model(model)
        patterns = images or write_demo_scenes(Path(name) / "corpus", num=num, size_px=size)
        views = read_views(patterns, spec, num=num)
        _print(measure_storage(folder, views, blocks=block or PAPER_BLOCKS), as_json)
    return 0


def profile(
    model: UNetModel,
    head: Annotated[
        str, typer.Option(help="The head that a training step is of; none: encoding alone.")
    ] = "ldznet",
    size: Annotated[int, typer.Option(help="Side of a view in px, a multiple of 64.")] = 384,
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:1; default cuda where there is one.")
    ] = None,
    compute: Annotated[
        str,
        typer.Option(
            help="float32, bfloat16 or float16, of encoding; a training step is float32, or under "
            "bfloat16 autocast with the two others."
        ),
    ] = "float32",
    storage: Annotated[str, typer.Option(help="float16 or int8.")] = "float16",
    repeats: Annotated[int, typer.Option(min=1, help="Measured batches, after a warm-up.")] = 3,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    as_json: AsJson = False,
) -> int:
    """Where the time of encoding and of a step goes."""
    import torch

    from pipeline.bench_profile import (
        ProfileOptions,
        describe_machine,
        profile_model,
        read_ldm_configs,
    )
    from pipeline.meter import choose_device

    if threads is not None:
        torch.set_num_threads(threads)
    options = ProfileOptions(
        size_px=size,
        batch=batch,
        device=choose_device(device),
        head=None if head == "none" else head,
        compute=compute,
        storage=storage,
        repeats=repeats,
    )
    rows, times = profile_model(read_ldm_configs(model), options)
    _print_profile(rows, times, describe_machine(options.device), as_json)
    return 0


def tuning(
    model: Annotated[
        str | None,
        typer.Option(help="A diffusers folder; sd14: SD 1.4's size; default: the demo's."),
    ] = None,
    size: Annotated[int, typer.Option(help="Side of a view in px, a multiple of 64.")] = 128,
    batch: Annotated[int, typer.Option(min=2, help="Rows.")] = 8,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:1; default cuda where there is one.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Deviation and time of encode's run options and lower precision."""
    from models.ldznet import PAPER_BLOCKS
    from pipeline.bench_models import load_unet
    from pipeline.bench_tuning import measure_tuning
    from pipeline.meter import check_measured, choose_device

    chosen = choose_device(device)
    check_measured("bench tuning", size_px=size, device=chosen)  # before a model is loaded

    rows = measure_tuning(
        load_unet(model),
        blocks=PAPER_BLOCKS,
        size_px=size,
        batch=batch,
        device=chosen,
    )
    _print(rows, as_json)
    return 0


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
    from pipeline.bench_store import measure_store

    sizes = _parse_sizes(tasks)
    with _scratch_folder(directory) as folder:
        _print(measure_store(folder, sizes), as_json)
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
    from pipeline.bench_write import measure_memory, measure_write

    with _scratch_folder(directory) as folder:
        speeds = measure_write(folder, int(gb * 1e9), repeats=repeats)
        peaks = measure_memory(folder) if memory else []
    if as_json:
        typer.echo(json.dumps({"speed": _plain(speeds), "memory": _plain(peaks)}, indent=2))
        return 0
    _print(speeds, as_json)
    if peaks:
        typer.echo("\nPeak memory of a process that writes one block's features:\n")
        _print(peaks, as_json)
    return 0


def encode(
    model: Annotated[
        str | None,
        typer.Option(help="A diffusers folder; sd14: SD 1.4's size, random; default: the demo's."),
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
    from models.tuning import Tuning
    from pipeline.bench_encode import measure_encode
    from pipeline.bench_models import write_random_model
    from pipeline.meter import check_measured, choose_device
    from pipeline.scenes import write_corpus
    from pipeline.spec import Spec, validate

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
        _print(rows, as_json)
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
    from pipeline.bench_tasks import measure_tasks

    _print(measure_tasks(_parse_sizes(tasks), num_actors=actors), as_json)
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
    from pipeline.bench_reader import measure_objects, measure_reader, measure_workers

    if url is not None:
        _print(measure_objects(url), as_json)
        return 0
    with _scratch_folder(directory) as folder:
        rows = measure_reader(folder)
        _print(rows + measure_workers(folder, _parse_sizes(workers)), as_json)
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


def _plain(rows: Sequence[Any]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def _print(rows: Sequence[Any], as_json: bool) -> None:
    from pipeline.table import format_table

    typer.echo(json.dumps(_plain(rows), indent=2) if as_json else format_table(_plain(rows)))


def _print_profile(
    rows: Sequence[Any], times: Sequence[Any], machine: dict[str, str | int], as_json: bool
) -> None:
    if as_json:
        found = {"machine": machine, "parts": _plain(rows), "stages": _plain(times)}
        typer.echo(json.dumps(found, indent=2))
        return
    _print(rows, as_json)
    typer.echo("\nWhole, without waiting for the device at each part:\n")
    _print(times, as_json)
    typer.echo("\n" + ", ".join(f"{key} {value}" for key, value in machine.items()))
