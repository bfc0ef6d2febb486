"""``ldznet encode``: encode what is not committed yet."""

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from jobs.encode_options import Batch, ChannelsLast, CompileBlocks, Decoders, Root, SplitGb, Threads

EXIT_INCOMPLETE = 3


def encode(
    corpus: Annotated[
        list[str],
        typer.Option(help="Tars, as a path or fsspec URL with globs and braces; repeatable."),
    ],
    store: Annotated[str, typer.Option(help="The store's folder; made where there is none.")],
    spec: Annotated[Path, typer.Option(help="YAML: what to encode.")],
    actors: Annotated[
        str | None,
        typer.Option(
            help="Workers, N or MIN:MAX as nodes come and go; default what there is room for; "
            "0: here, without Ray."
        ),
    ] = None,
    batch: Batch = 16,
    threads: Threads = None,
    decoders: Decoders = None,
    gpus: Annotated[
        float | None,
        typer.Option(min=0, help="GPUs a worker; default 1 where the cluster has any now."),
    ] = None,
    channels_last: ChannelsLast = False,
    compile_blocks: CompileBlocks = False,
    split_gb: SplitGb = None,
    stall_minutes: Annotated[
        float,
        typer.Option(min=0.01, help="A worker without progress for so long is killed, replaced."),
    ] = 15.0,
    limit: Annotated[int | None, typer.Option(min=1, help="Encode at most so many tars.")] = None,
    root: Root = None,
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
    typer.echo("encode: looking at the spec, the model, the tars and the store", err=True)
    from jobs.command import format_command
    from jobs.outputs import check_outlives_job, check_writable
    from models.ldm.tuning import Tuning
    from pipeline.base.yaml import load_yaml
    from pipeline.encode.actor_pool import ActorBounds
    from pipeline.encode.prepare import prepare_encode
    from pipeline.encode.run import run_encode
    from pipeline.encode.totals import EncodeTotals
    from pipeline.spec.fields import Spec
    from pipeline.upkeep.verify import read_damage

    bounds = None if actors is None else ActorBounds.parse(actors)
    check_outlives_job("--store", store)
    if metrics is not None:
        check_outlives_job("--metrics", metrics)
    started = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    records = metrics or Path("ldznet-runs") / f"encode-{started}" / "metrics.jsonl"
    check_writable("--metrics", records)
    run = prepare_encode(
        load_yaml(spec, Spec),
        corpus,
        store,
        root=root,
        limit=limit,
        split_bytes=None if split_gb is None else round(split_gb * 2**30),
        batch=batch,
        stall_s=60 * stall_minutes,
        tuning=Tuning(channels_last=channels_last, compile=compile_blocks),
        damage=read_damage(repair) if repair else (),
        where=str(spec),
    )
    typer.echo(run.describe())
    if not run.items:
        typer.echo(f"nothing to do: all {run.num_tasks} tasks are committed")
        return 0
    totals = EncodeTotals.of_run(run)
    try:
        run_encode(
            run,
            actors=bounds,
            num_threads=threads,
            num_decoders=decoders,
            num_gpus=gpus,
            max_failures=max_failures,
            metrics_path=records,
            totals=totals,
        )
    except KeyboardInterrupt:
        typer.echo(totals.describe())
        raise
    typer.echo(totals.describe(command=format_command(sys.argv[1:])))
    typer.echo(f"records: {records}")
    too_many = max_rejects is not None and totals.num_rejects > max_rejects
    if too_many:
        typer.echo(f"{totals.num_rejects} rejects, over --max-rejects {max_rejects}", err=True)
    return EXIT_INCOMPLETE if totals.failures or too_many else 0
