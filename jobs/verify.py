"""``ldznet verify``: check every checksum of a store."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from jobs.command import EXIT_FAILED, format_command
from jobs.options import AsJson, Metrics, StoreUrl
from jobs.outputs import check_outlives_job, check_writable, choose_metrics


def verify(
    store: StoreUrl,
    report: Annotated[
        Path | None, typer.Option(help="JSON to write, for `ldznet encode --repair`.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Commits that are checked at once.")] = 8,
    as_json: AsJson = False,
    metrics: Metrics = None,
) -> int:
    """Read every committed file and compare its checksum, indexes and counts with the records."""
    from pipeline.base.progress import Progress
    from pipeline.store.store import Store
    from pipeline.upkeep.verify import VerifyTotals, count_commits, describe_damage, verify_store

    if report is not None:
        check_outlives_job("--report", report)
        check_writable("--report", report)
    records = choose_metrics("verify", metrics)
    opened = Store.open(store)
    totals, num = VerifyTotals(), count_commits(opened)
    with Progress("verify", total=num, unit="commits", metrics_path=records) as progress:
        for check in verify_store(opened, num_threads=threads):
            totals.add(check)
            num_mb, num_damaged = round(totals.num_bytes / 1e6), len(totals.damage)
            progress.update(totals.num_commits, MB=num_mb, damaged=num_damaged)
    if report is not None:
        totals.write(report)
    if as_json:
        typer.echo(json.dumps(asdict(totals), indent=2))
    else:
        typer.echo(
            f"verified {totals.num_commits} commits, {totals.num_files} files, "
            f"{totals.num_bytes / 1e6:.1f} MB: {len(totals.damage) or 'no'} damage"
        )
        again, written = format_command(["verify", store]), str(report) if report else None
        for line in describe_damage(totals.damage, verify=again, report=written):
            typer.echo(line)
    return EXIT_FAILED if totals.damage else 0
