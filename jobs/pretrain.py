"""``ldznet pretrain``: train the tiny latent diffusion model."""

from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer


def pretrain(
    out: Annotated[Path, typer.Option(help="Folder for everything it makes.")],
    config: Annotated[
        Path | None, typer.Option(help="YAML; default: the recipe of the bundled model.")
    ] = None,
    stage: Annotated[str, typer.Option(help="corpus, vae, encode, ldm, card, or all.")] = "all",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint.")
    ] = False,
) -> int:
    """Train the tiny VAE, then UNet and text encoder together, and export them with a card."""
    from pipeline.base.yaml import load_yaml
    from pipeline.pretrain.config import PretrainConfig
    from pipeline.pretrain.run import run_pretrain

    path = config or Path(str(files("jobs") / "recipes" / "pretrain.yaml"))
    done = run_pretrain(load_yaml(path, PretrainConfig), out, stage=stage, resume=resume, say=_say)
    typer.echo(str(done))
    return 0


def _say(text: str) -> None:
    typer.echo(text, err=True)
