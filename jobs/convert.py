"""``ldznet convert``: turn published checkpoints into folders that ldznet reads."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from jobs.outputs import check_folder


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="A CompVis or LD-ZNet checkpoint file, or a diffusers folder of pickles."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The new folder.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of the CLIP tokenizer; a checkpoint has none."),
    ] = None,
    ldm: Annotated[
        Path | None,
        typer.Option(
            help="For LD-ZNet: a diffusers folder with the parts that its checkpoint lacks."
        ),
    ] = None,
    num_heads: Annotated[
        int,
        typer.Option(min=1, help="Attention heads of the UNet; the weights' shapes do not tell."),
    ] = 8,
    weights: Annotated[
        Literal["ema", "raw"] | None,
        typer.Option(
            help="For Stable Diffusion: the UNet's averaged or its raw weights. Default: ema where "
            "the file has them. LD-ZNet's public code takes features from the raw weights of "
            "sd-v1-4-full-ema: give raw for a folder that becomes --ldm."
        ),
    ] = None,
    dtype: Annotated[
        Literal["float32", "float16"] | None,
        typer.Option(
            help="Dtype of the weights written; default: the file's own, a network's widest."
        ),
    ] = None,
) -> int:
    """Convert a checkpoint, or a folder of pickles; no code in a pickle runs."""
    check_folder("--out", out)
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
