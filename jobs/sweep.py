"""``ldznet sweep``: train many heads over one store and compare them in one table."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from jobs.command import EXIT_INCOMPLETE, format_command
from jobs.options import StoreOption, check_store
from jobs.outputs import check_folder


def sweep(
    store: StoreOption,
    config: Annotated[Path, typer.Option(help="YAML: a training config, and what varies.")],
    out: Annotated[Path, typer.Option(help="Folder for the trials, the tables and the heat map.")],
    trials_at_once: Annotated[
        int | None,
        typer.Option(
            min=0, help="Default: as many as there is room for; 0: in this process, without Ray."
        ),
    ] = None,
    cpus_per_trial: Annotated[
        float | None, typer.Option(min=0.01, help="CPU cores of a trial; default: 1.")
    ] = None,
    gpus_per_trial: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="GPUs of a trial; default, where there are any: 1, or 0.25 if all are probes.",
        ),
    ] = None,
) -> int:
    """Train and score many heads over one store; a second run does only what is missing."""
    from pipeline.base.yaml import load_yaml
    from pipeline.runs.start import look_up_starts
    from pipeline.sweep.config import SweepConfig

    check_folder("--out", out, store=store, own={"lock"}, foreign={"checkpoints"})
    parsed = load_yaml(config, SweepConfig, prepare=look_up_starts)
    check_store(store)
    from pipeline.sweep.run import open_sweep, run_sweep

    with open_sweep(parsed, store, out) as plan:
        typer.echo(plan.describe())
        run = run_sweep(
            plan, at_once=trials_at_once, num_cpus=cpus_per_trial, num_gpus=gpus_per_trial
        )
    typer.echo(run.describe(command=format_command(sys.argv[1:])))
    return EXIT_INCOMPLETE if run.failures else 0
