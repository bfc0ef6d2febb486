"""``ldznet train``: fit a head from a store."""

from pathlib import Path
from typing import Annotated

import typer


def train(
    store: Annotated[str, typer.Option(help="The store's folder.")],
    config: Annotated[Path, typer.Option(help="YAML: the head and how it is trained.")],
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and metrics.jsonl.")],
    workers: Annotated[
        int | None,
        typer.Option(min=0, help="Processes; default one a GPU, else 1; 0: here, without Ray."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint.")
    ] = False,
    max_failures: Annotated[
        int, typer.Option(min=0, help="Lost workers or nodes that are replaced.")
    ] = 10,
) -> int:
    """Fit a head on a store's pairs, without the diffusion model."""
    from jobs.outputs import check_outlives_job
    from pipeline.base.yaml import load_yaml
    from pipeline.runs.config import TrainConfig
    from pipeline.train.run import run_train

    check_outlives_job("--out", out)
    parsed = load_yaml(config, TrainConfig)
    folder = run_train(
        parsed, store, out, num_workers=workers, resume=resume, max_failures=max_failures
    )
    typer.echo(f"checkpoint {folder}")
    return 0
