"""``ldznet convert``: published checkpoints and pickles, as what is read here."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="A CompVis or LD-ZNet checkpoint file, or a diffusers folder with pickles."
        ),
    ],
    out: Annotated[Path, typer.Option(help="New folder to write.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of the CLIP tokenizer, which a checkpoint lacks."),
    ] = None,
    ldm: Annotated[
        Path | None,
        typer.Option(help="LD-ZNet: diffusers folder with the parts that the checkpoint lacks."),
    ] = None,
    num_heads: Annotated[
        int, typer.Option(min=1, help="Attention heads of the UNet, which no shape tells.")
    ] = 8,
    weights: Annotated[
        Literal["ema", "raw"] | None,
        typer.Option(
            help="Stable Diffusion: the UNet's moving averages, or its raw weights. Default ema, "
            "where the file has them. LD-ZNet's public code reads sd-v1-4-full-ema raw for its "
            "features: give raw for a folder to pass as --ldm."
        ),
    ] = None,
    dtype: Annotated[
        Literal["float32", "float16"] | None,
        typer.Option(
            help="Of the weights written; default the file's own, the widest of a network."
        ),
    ] = None,
) -> int:
    """Convert a checkpoint or a folder of pickles; nothing in a pickle is run."""
    import torch

    from pipeline.convert import ConvertOptions, run_convert

    options = ConvertOptions(
        tokenizer=tokenizer,
        ldm=ldm,
        num_heads=num_heads,
        dtype=getattr(torch, dtype) if dtype else None,
        weights=weights,
    )
    for line in run_convert(source, out, options):
        typer.echo(line)
    return 0
