"""``ldznet verify``: every checksum of a store."""

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

EXIT_DAMAGED = 1


def verify(
    store: Annotated[str, typer.Argument(help="The store's folder or s3:// URL.")],
    report: Annotated[
        Path | None, typer.Option(help="JSON to write, for `ldznet encode --repair`.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Commits checked at once.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    metrics: Annotated[
        Path | None, typer.Option(help="metrics.jsonl; default under ldznet-runs/.")
    ] = None,
) -> int:
    """Read every committed file; hold its checksum, indexes and accounting to the records."""
    from jobs.outputs import check_outlives_job, check_writable
    from pipeline.base.progress import Progress
    from pipeline.base.yaml import SpecError
    from pipeline.store.store import Store
    from pipeline.upkeep.verify import VerifyTotals, count_commits, describe_damage, verify_store

    started = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    records = metrics or Path("ldznet-runs") / f"verify-{started}" / "metrics.jsonl"
    for option, path in (("--report", report), ("--metrics", metrics)):
        if path is not None:
            check_outlives_job(option, path)
    for option, path in (("--report", report), ("--metrics", records)):
        if path is not None:
            check_writable(option, path)
    opened = Store.open(store)
    if not opened.list_layers():
        raise SpecError(f"{opened.storage.url}: expected a store, found no layer there")
    totals = VerifyTotals()
    with Progress(
        "verify",
        total=count_commits(opened),
        unit="commits",
        metrics_path=records,
    ) as progress:
        for check in verify_store(opened, num_threads=threads):
            totals.add(check)
            progress.update(
                totals.num_commits,
                MB=round(totals.num_bytes / 1e6),
                damaged=len(totals.damage),
            )
    if report is not None:
        totals.write(report)
    if as_json:
        typer.echo(json.dumps(asdict(totals), indent=2))
    else:
        typer.echo(
            f"verified {totals.num_commits} commits, {totals.num_files} files, "
            f"{totals.num_bytes / 1e6:.1f} MB: {len(totals.damage) or 'no'} damage"
        )
        for line in describe_damage(totals.damage):
            typer.echo(line)
    return EXIT_DAMAGED if totals.damage else 0
