"""``ldznet pretrain``: train the tiny latent diffusion model."""

from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from jobs.options import Resume
from jobs.outputs import check_folder


def pretrain(
    out: Annotated[Path, typer.Option(help="Folder for all results.")],
    config: Annotated[
        Path | None,
        typer.Option(help="YAML; default: the recipe of the model that comes with ldznet."),
    ] = None,
    stage: Annotated[
        str, typer.Option(help="One stage: corpus, vae, encode, ldm or card; or all.")
    ] = "all",
    resume: Resume = False,
) -> int:
    """Train a tiny VAE, then its UNet and text encoder; write them with a model card."""
    check_folder("--out", out, own={"lock"})
    from pipeline.base.yaml import load_yaml
    from pipeline.pretrain.config import PretrainConfig

    path = config or Path(str(files("jobs") / "recipes" / "pretrain.yaml"))
    recipe, say = load_yaml(path, PretrainConfig), partial(typer.echo, err=True)
    from pipeline.pretrain.run import run_pretrain

    typer.echo(str(run_pretrain(recipe, out, stage=stage, resume=resume, say=say)))
    return 0
