"""``ldznet evaluate``: score a checkpoint on a store's pairs."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from jobs.options import AsJson, Batch, StoreOption, check_store


def evaluate(
    store: StoreOption,
    checkpoint: Annotated[Path, typer.Option(help="A checkpoint, or a training's --out.")],
    tasks: Annotated[
        str | None, typer.Option(help="Glob over task ids; default: the config's data.validation.")
    ] = None,
    batch: Batch = 32,
    limit: Annotated[int | None, typer.Option(min=1, help="Score at most so many pairs.")] = None,
    snapshot: Annotated[
        str | None,
        typer.Option(
            help="The snapshot to score: an ID, or newest; default: the run's own, else newest."
        ),
    ] = None,
    workers: Annotated[
        int,
        typer.Option(
            min=0, help="Ray processes; 0 or 1: this process, without Ray. The figures are equal."
        ),
    ] = 1,
    negatives: Annotated[
        bool,
        typer.Option(
            "--negatives",
            help="Also score negatives: the share with a false answer, any pixel over a threshold.",
        ),
    ] = False,
    layer: Annotated[
        str | None,
        typer.Option(
            help="Folder or fingerprint of the layer to score on, of the head's model; default: "
            "the one it was trained on, or the store's only one that fits."
        ),
    ] = None,
    protocol: Annotated[
        Literal["phrasecut"] | None,
        typer.Option(help="Also the figures of PhraseCut's evaluator, at the images' own size."),
    ] = None,
    annotations: Annotated[
        Path | None, typer.Option(help="With --protocol phrasecut: its refer_<split>.json.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Compute mIoU, IoU_FG, AP and AP_clipseg of a head, and of two baselines without a head."""
    from pipeline.runs.checkpoint import find_checkpoint

    if (protocol is None) != (annotations is None):
        raise ValueError("--protocol phrasecut and --annotations FILE are given together")
    find_checkpoint(checkpoint)
    check_store(store)
    from pipeline.evaluate.run import format_rows, run_evaluate

    rows = run_evaluate(
        store,
        checkpoint,
        tasks=tasks,
        batch_size=batch,
        limit=limit,
        snapshot=snapshot,
        num_workers=max(1, workers),
        negatives=negatives,
        layer=layer,
        annotations=annotations,
    )
    if as_json:
        plain = [
            {
                "name": row.name,
                "baseline": row.baseline,
                **asdict(row.scores),
                **row.negatives,
                **row.official,
                "snapshot": row.snapshot,
            }
            for row in rows
        ]
        typer.echo(json.dumps(plain, indent=2))
    else:
        typer.echo(format_rows(rows))
    return 0
