"""``ldznet blocks``: list the blocks of a model's UNet."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.options import AsJson, SizePx
from pipeline.report.markdown import format_table

if TYPE_CHECKING:  # it imports torch, which --help must not wait for
    from pipeline.spec.blocks import BlockRow


def blocks(
    model: Annotated[
        str, typer.Argument(help="A diffusers folder or hub id; sd14: SD 1.4's config.")
    ],
    size: SizePx = 384,
    as_json: AsJson = False,
) -> int:
    """List a UNet's blocks: shape, bytes a draw, FLOPs up to each. Needs only its config."""
    from pipeline.base.machine import check_measured, choose_device
    from pipeline.spec.blocks import list_block_rows, read_unet_config

    check_measured("blocks", size_px=size, device=choose_device("cpu"))
    rows = list_block_rows(read_unet_config(model), size_px=size)
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        typer.echo(format_block_rows(rows))
    return 0


def format_block_rows(rows: "Sequence[BlockRow]") -> str:
    """Return the rows as a Markdown table, and the full forward pass in a line below it."""
    total = rows[-1].gflop / rows[-1].share
    table = format_table([asdict(row) for row in rows])
    return f"{table}\n\nfull forward pass: {total:#.4g} GFLOP a row"
