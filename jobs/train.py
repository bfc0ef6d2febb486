"""``ldznet train``: train a head from a store."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from jobs.options import Patience, Resume, StoreOption, check_store
from jobs.outputs import check_folder
from pipeline.base.outages import PATIENCE, TOTAL_S


def train(
    store: StoreOption,
    config: Annotated[Path, typer.Option(help="YAML: the head and how it is trained.")],
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and metrics.jsonl.")],
    workers: Annotated[
        int | None,
        typer.Option(
            min=0, help="Processes; default: one a GPU, or 1; 0: this process, without Ray."
        ),
    ] = None,
    resume: Resume = False,
    patience: Patience = TOTAL_S / 60,
    max_failures: Annotated[
        int, typer.Option(min=0, help="Replace at most so many lost workers or nodes.")
    ] = 10,
) -> int:
    """Train a head on a store's pairs, without running the diffusion model."""
    from pipeline.runs.lock import RunLock

    check_folder("--out", out, store=store, own={"lock"}, foreign={"sweep.json"})
    RunLock(out, "run").check_free()  # before the seconds that torch and Ray take to import
    from pipeline.base.yaml import load_yaml
    from pipeline.runs.config import TrainConfig
    from pipeline.runs.start import look_up_starts

    PATIENCE.total_s = 60 * patience
    look_up = partial(look_up_starts, resumed=out if resume else None)
    parsed = load_yaml(config, TrainConfig, prepare=look_up)
    check_store(store)
    from pipeline.train.run import run_train

    folder = run_train(
        parsed, store, out, num_workers=workers, resume=resume, max_failures=max_failures
    )
    typer.echo(f"checkpoint {folder}")
    return 0
