"""The benchmarks of models: their cost, their storage's error, where their time goes."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.bench_table import AsJson, plain_rows, print_rows
from jobs.blocks import blocks

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
    from pipeline.bench.models import count_parameters
    from pipeline.spec.blocks import read_unet_config

    print_rows(count_parameters(read_unet_config(model)), as_json)
    return 0


def storage(
    model: Annotated[
        str | None,
        typer.Option(help="A diffusers folder or hub id; default: a tiny one, random."),
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
    from models.heads.ldznet import PAPER_BLOCKS
    from pipeline.base.machine import check_measured, choose_device
    from pipeline.bench.models import (
        measure_storage,
        read_views,
        write_demo_model,
        write_demo_scenes,
    )
    from pipeline.spec.fetch_model import fetch_model
    from pipeline.spec.fields import LatentsSpec

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
        print_rows(measure_storage(folder, views, blocks=block or PAPER_BLOCKS), as_json)
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

    from pipeline.base.machine import choose_device, describe_machine
    from pipeline.bench.profile import ProfileOptions, profile_model, read_ldm_configs

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
        typer.Option(help="A diffusers folder; sd14: SD 1.4's size; default: a tiny one, random."),
    ] = None,
    size: Annotated[int, typer.Option(help="Side of a view in px, a multiple of 64.")] = 128,
    batch: Annotated[int, typer.Option(min=2, help="Rows.")] = 8,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:1; default cuda where there is one.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Deviation and time of encode's run options and lower precision."""
    from models.heads.ldznet import PAPER_BLOCKS
    from pipeline.base.machine import check_measured, choose_device
    from pipeline.bench.models import load_unet
    from pipeline.bench.tuning import measure_tuning

    chosen = choose_device(device)
    check_measured("bench tuning", size_px=size, device=chosen)  # before a model is loaded

    rows = measure_tuning(
        load_unet(model),
        blocks=PAPER_BLOCKS,
        size_px=size,
        batch=batch,
        device=chosen,
    )
    print_rows(rows, as_json)
    return 0


def _print_profile(
    rows: Sequence[Any], times: Sequence[Any], machine: dict[str, str | int], as_json: bool
) -> None:
    if as_json:
        found = {"machine": machine, "parts": plain_rows(rows), "stages": plain_rows(times)}
        typer.echo(json.dumps(found, indent=2))
        return
    print_rows(rows, as_json)
    typer.echo("\nWhole, without waiting for the device at each part:\n")
    print_rows(times, as_json)
    typer.echo("\n" + ", ".join(f"{key} {value}" for key, value in machine.items()))
