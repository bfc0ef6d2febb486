"""``ldznet encode``: encode what is not committed yet."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

EXIT_INCOMPLETE = 3


def encode(
    corpus: Annotated[
        list[str],
        typer.Option(help="Tars, as a path or fsspec URL with globs and braces; repeatable."),
    ],
    store: Annotated[str, typer.Option(help="The store's folder; made where there is none.")],
    spec: Annotated[Path, typer.Option(help="YAML: what to encode.")],
    actors: Annotated[
        int | None,
        typer.Option(min=0, help="Workers; default one a GPU or core; 0: here, without Ray."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows a pass through a model.")] = 16,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads a worker.")] = None,
    gpus: Annotated[
        float | None,
        typer.Option(min=0, help="GPUs a worker; default 1 where the cluster has any now."),
    ] = None,
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="NHWC convolutions: faster on many GPUs.")
    ] = False,
    compile_blocks: Annotated[
        bool, typer.Option("--compile", help="torch.compile; a minute or more a worker at first.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Encode at most so many tars.")] = None,
    root: Annotated[
        str | None, typer.Option(help="Folder that task ids are relative to; default: deduced.")
    ] = None,
    max_rejects: Annotated[
        int | None, typer.Option(min=0, help="Status 3 when this run rejected more.")
    ] = None,
    max_failures: Annotated[
        int | None,
        typer.Option(min=0, help="Stop when more tasks failed; default 20 and 1 in 100."),
    ] = None,
    repair: Annotated[
        Path | None,
        typer.Option(help="Report of `ldznet verify --report`: encode what it names anew."),
    ] = None,
    metrics: Annotated[
        Path | None, typer.Option(help="metrics.jsonl; default under ldznet-runs/.")
    ] = None,
) -> int:
    """Encode a corpus into a store; a second run does only what is missing."""
    from models.tuning import Tuning
    from pipeline.encode import prepare_encode
    from pipeline.encode_job import run_encode
    from pipeline.spec import Spec, load_yaml
    from pipeline.verify import read_damage

    started = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    run = prepare_encode(
        load_yaml(spec, Spec),
        corpus,
        store,
        root=root,
        limit=limit,
        batch=batch,
        tuning=Tuning(channels_last=channels_last, compile=compile_blocks),
        damage=read_damage(repair) if repair else (),
    )
    typer.echo(run.describe())
    totals = run_encode(
        run,
        num_actors=actors,
        num_threads=threads,
        num_gpus=gpus,
        max_failures=max_failures,
        metrics_path=metrics or Path("ldznet-runs") / f"encode-{started}" / "metrics.jsonl",
    )
    typer.echo(totals.describe())
    too_many = max_rejects is not None and totals.num_rejects > max_rejects
    if too_many:
        typer.echo(f"{totals.num_rejects} rejects, over --max-rejects {max_rejects}", err=True)
    return EXIT_INCOMPLETE if totals.failures or too_many else 0
