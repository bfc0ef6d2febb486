"""``ldznet evaluate``: score a checkpoint on a store's pairs."""

import json
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    store: Annotated[str, typer.Option(help="The store's folder.")],
    checkpoint: Annotated[Path, typer.Option(help="A checkpoint, or the --out of a training.")],
    tasks: Annotated[
        str | None, typer.Option(help="Glob over task ids; default: the config's validation.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pairs a pass.")] = 32,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many pairs.")] = None,
    snapshot: Annotated[
        str | None,
        typer.Option(help="Whose pairs: an ID, or newest; default: the run's own, else newest."),
    ] = None,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes on Ray; 1: here. The figures are the same.")
    ] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Score mIoU, IoU_FG and AP, with two rows beside them that need no head."""
    from pipeline.evaluate.run import format_rows, run_evaluate
    from pipeline.evaluate.scoring import list_figures

    rows = run_evaluate(
        store,
        checkpoint,
        tasks=tasks,
        batch_size=batch,
        limit=limit,
        snapshot=snapshot,
        num_workers=workers,
    )
    if as_json:
        plain = [
            {
                "name": row.name,
                "baseline": row.baseline,
                **list_figures(row.scores),
                "snapshot": row.snapshot,
            }
            for row in rows
        ]
        typer.echo(json.dumps(plain, indent=2))
    else:
        typer.echo(format_rows(rows))
    return 0
