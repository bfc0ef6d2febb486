"""``ldznet sweep``: many heads over one store, as one table."""

import sys
from pathlib import Path
from typing import Annotated

import typer

EXIT_INCOMPLETE = 3


def sweep(
    store: Annotated[str, typer.Option(help="The store's folder.")],
    config: Annotated[Path, typer.Option(help="YAML: a training config and what is varied.")],
    out: Annotated[Path, typer.Option(help="Folder for the trials, the tables, the heat map.")],
    trials_at_once: Annotated[
        int | None,
        typer.Option(min=0, help="Default what there is room for; 0: here, without Ray."),
    ] = None,
    cpus_per_trial: Annotated[
        float | None, typer.Option(min=0.01, help="Of a trial's node; default 1.")
    ] = None,
    gpus_per_trial: Annotated[
        float | None,
        typer.Option(min=0, help="Default, with GPUs, 1, or 0.25 where all heads are probes."),
    ] = None,
) -> int:
    """Fit many heads: variants, blocks, draws, rates, seeds; a second run does what is missing."""
    from jobs.command import format_command
    from jobs.outputs import check_outlives_job
    from pipeline.base.yaml import load_yaml
    from pipeline.sweep.config import SweepConfig
    from pipeline.sweep.run import open_sweep, run_sweep

    check_outlives_job("--out", out)
    with open_sweep(load_yaml(config, SweepConfig), store, out) as plan:
        typer.echo(plan.describe())
        run = run_sweep(
            plan, at_once=trials_at_once, num_cpus=cpus_per_trial, num_gpus=gpus_per_trial
        )
    typer.echo(run.describe(command=format_command(sys.argv[1:])))
    return EXIT_INCOMPLETE if run.failures else 0
