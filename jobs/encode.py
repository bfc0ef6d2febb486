"""``ldznet encode``: encode what is not committed yet."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from jobs import options
from jobs.command import EXIT_INCOMPLETE, format_command
from jobs.outputs import check_outlives_job, choose_metrics
from pipeline.base.outages import PATIENCE, TOTAL_S


def encode(
    store: options.OptionalStore = None,
    spec: Annotated[Path | None, typer.Option(help="YAML: what to encode.")] = None,
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            help="Tars: a path or URL with braces or globs; may be given several times. Without it "
            "features are encoded over all latents that the store has, and no tar is needed."
        ),
    ] = None,
    actors: options.Actors = None,
    batch: options.Batch = 16,
    threads: options.Threads = None,
    decoders: options.Decoders = None,
    gpus: options.Gpus = None,
    channels_last: options.ChannelsLast = False,
    compile_blocks: options.CompileBlocks = False,
    split_gb: options.SplitGb = None,
    stall_minutes: Annotated[
        float,
        typer.Option(min=0.01, help="A worker without progress for so long is replaced."),
    ] = 15.0,
    patience: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Minutes to wait for a store or corpus that does not answer; default: 10, or two "
            "thirds of --stall-minutes where that is less.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Encode at most so many tars.")] = None,
    root: options.Root = None,
    max_rejects: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="End with status 3 when this run rejected more samples, members and pairs, "
            "together; default: no limit.",
        ),
    ] = None,
    max_failures: Annotated[
        int | None,
        typer.Option(
            min=0, help="Stop when more tasks failed; default: 20, and one in 100 of all tasks."
        ),
    ] = None,
    repair: Annotated[
        Path | None,
        typer.Option(help="Encode again what this report of `ldznet verify --report` names."),
    ] = None,
    changed: Annotated[
        Literal["fail", "renew", "keep"],
        typer.Option(
            help="Of tars that changed since they were encoded: fail their tasks, renew them "
            "(encode them again), or keep what is stored."
        ),
    ] = "fail",
    rehash: Annotated[
        bool,
        typer.Option(
            "--rehash", help="Read every tar that was encoded before, to find changes unseen."
        ),
    ] = False,
    metrics: options.Metrics = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Say what the first tar of each pattern holds, and what would be stored, set "
            "aside and rejected. Needs no store and no model, and writes nothing; --spec is "
            "optional, other options are not used.",
        ),
    ] = False,
) -> int:
    """Encode a corpus into a store; a second run encodes only what is missing."""
    if dry_run:
        return look_into_corpus(corpus, spec)
    if store is None or spec is None:
        raise ValueError("encode: expected --store and --spec, or --dry-run with --corpus")
    PATIENCE.total_s = 60 * choose_patience(patience, stall_minutes=stall_minutes)
    from pipeline.base.yaml import load_yaml
    from pipeline.spec.fields import Spec

    parsed = load_yaml(spec, Spec)
    typer.echo("encode: reading the model, the list of tars and the store", err=True)
    from models.ldm.tuning import Tuning
    from pipeline.base.progress_text import count_noun
    from pipeline.encode.actor_pool import ActorBounds
    from pipeline.encode.hash_tars import hash_tars
    from pipeline.encode.prepare import prepare_encode
    from pipeline.encode.run import run_encode
    from pipeline.encode.totals import EncodeTotals
    from pipeline.upkeep.verify import read_damage

    bounds = None if actors is None else ActorBounds.parse(actors)
    check_outlives_job("--store", store)
    records = choose_metrics("encode", metrics)
    run = prepare_encode(
        parsed,
        corpus,
        store,
        root=root,
        limit=limit,
        split_bytes=None if split_gb is None else round(split_gb * 2**30),
        batch=batch,
        stall_s=60 * stall_minutes,
        tuning=Tuning(channels_last=channels_last, compile=compile_blocks),
        damage=read_damage(repair) if repair else (),
        changed=changed,
        rehash=rehash,
        where=str(spec),
    )
    if run.suspects:
        found = hash_tars(run.suspects, on_ray=bounds is None or bounds.max > 0)
        run = run.resolve(found.digests, found.unread)
    typer.echo(run.describe())
    if not run.items and not run.failed:
        typer.echo(f"nothing to do: all committed ({count_noun(run.num_tasks, 'task')})")
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
    if totals.num_rejects:
        typer.echo(f"which ones: {format_command(['inspect', store, '--rejects'])}")
    typer.echo(f"records: {records}")
    too_many = max_rejects is not None and totals.num_rejects > max_rejects
    if too_many:
        typer.echo(f"{totals.num_rejects} rejects, over --max-rejects {max_rejects}", err=True)
    return EXIT_INCOMPLETE if totals.failures or totals.empty_tars or too_many else 0


def look_into_corpus(corpus: list[str] | None, spec: Path | None) -> int:
    """Do a dry run; the status is 0 if something would be stored."""
    from pipeline.base.yaml import load_yaml
    from pipeline.encode.dry_run import dry_run
    from pipeline.spec.fields import Spec

    if not corpus:
        raise ValueError("--dry-run: expected the tars to look into, --corpus, got none")
    PATIENCE.total_s = 60 * choose_patience(None, stall_minutes=15)
    found = dry_run(corpus, None if spec is None else load_yaml(spec, Spec), say=typer.echo)
    return 0 if found else EXIT_INCOMPLETE


def choose_patience(patience: float | None, *, stall_minutes: float) -> float:
    """Return the minutes to wait for a store or corpus, by default as the option's help says.

    Raises:
        ValueError: a worker that waits so long would be taken for one that hangs.
    """
    if patience is None:
        return min(TOTAL_S / 60, stall_minutes * 2 / 3)
    if patience >= stall_minutes:
        raise ValueError(
            f"--patience: expected less than --stall-minutes {stall_minutes:g}, after which a "
            f"worker without progress is killed, got {patience:g}; raise --stall-minutes"
        )
    return patience
