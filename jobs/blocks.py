"""``ldznet blocks``: a model's blocks and what each costs."""

import json
from dataclasses import asdict
from typing import Annotated

import typer


def blocks(
    model: Annotated[
        str, typer.Argument(help="A diffusers folder or hub id; sd14: SD 1.4's config, built in.")
    ],
    size: Annotated[int, typer.Option(help="Side of a view in px, a multiple of 64.")] = 384,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """List a model's blocks: shape, bytes a draw, FLOPs up to each. Reads its config alone."""
    from pipeline.list_blocks import format_block_rows, list_block_rows, read_unet_config
    from pipeline.meter import check_measured, choose_device

    check_measured("blocks", size_px=size, device=choose_device("cpu"))
    rows = list_block_rows(read_unet_config(model), size_px=size)
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        typer.echo(format_block_rows(rows))
    return 0
