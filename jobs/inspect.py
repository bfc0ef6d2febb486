"""``ldznet inspect``: show what a store holds."""

import json
import os
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.options import AsJson, OptionalCorpus, Root, StoreUrl
from jobs.outputs import check_outlives_job, check_writable

if TYPE_CHECKING:
    from pipeline.store.store import Store
    from pipeline.upkeep.summary import StoreSummary

CLEAR = "\x1b[H\x1b[2J"


def inspect(
    store: StoreUrl,
    as_json: AsJson = False,
    html: Annotated[Path | None, typer.Option(help="Write the same as an HTML page, too.")] = None,
    fast: Annotated[
        bool,
        typer.Option(
            "--fast", help="Read no further record: totals are of the records known already."
        ),
    ] = False,
    corpus: OptionalCorpus = None,
    root: Root = None,
    watch: Annotated[
        float | None,
        typer.Option(
            min=1.0, help="Repeat every so many seconds, until Ctrl-C; waits for the first layer."
        ),
    ] = None,
    rejects: Annotated[
        bool,
        typer.Option("--rejects", help="List every reject, instead: task, reason, key, detail."),
    ] = False,
    reason: Annotated[
        list[str] | None, typer.Option(help="Rejects of this reason alone; repeatable.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the rejects to this Parquet file, not as text.")
    ] = None,
) -> int:
    """List a store's layers: tasks, rows, bytes, rejects, what came lately, share of a corpus."""
    from pipeline.corpus.tasks import list_tasks
    from pipeline.store.store import Store
    from pipeline.upkeep.inspect import StoreInspector

    others = {"--html": html, "--fast": fast, "--corpus": corpus, "--root": root, "--watch": watch}
    given = [option for option, value in others.items() if value]
    if rejects and given:
        raise ValueError(f"--rejects: expected no {' or '.join(given)}: it lists rejects alone")
    if rejects:
        return _list_rejects(Store.open(store), reason or [], as_json=as_json, out=out)
    if reason or out:
        raise ValueError(f"{'--reason' if reason else '--out'}: goes with --rejects alone")
    if html is not None:
        check_outlives_job("--html", html)
        check_writable("--html", html)
    tars = list_tasks(corpus, root=root) if corpus else []
    opened = Store.open(store)
    inspector = StoreInspector(opened)
    try:
        if watch is not None:
            _await_layer(opened, watch, as_json=as_json)
        while True:
            summary = inspector.summarise(fast=fast, tars=tars)
            _show(summary, as_json=as_json, clear=watch is not None)
            if html is not None:
                _write_page(html, store, summary)
            if watch is None:
                return 0
            time.sleep(watch)
    except KeyboardInterrupt:
        if watch is None:
            raise
        return 0


def _await_layer(store: "Store", every_s: float, *, as_json: bool) -> None:
    """Wait until a store has a layer: its first run may still read its spec or wait for a node."""
    if not store.list_layers():
        typer.echo(f"{store.storage.url}: waiting for the first layer", err=as_json)
    while not store.list_layers():
        time.sleep(every_s)


def _list_rejects(store: "Store", wanted: list[str], *, as_json: bool, out: Path | None) -> int:
    from pipeline.base.progress_text import count_noun, join_largest
    from pipeline.upkeep.rejects import RejectList, format_rejects, write_rejects

    if out is not None:
        check_outlives_job("--out", out)
        if as_json or out.suffix != ".parquet":
            raise ValueError(f"--out: expected FILE.parquet and no --json, got {out}")
        check_writable("--out", out)
    found = RejectList(store, wanted)
    try:
        if out is not None:
            write_rejects(out, found)
        layer = None
        for table in () if out is not None else found:
            if as_json:  # a line a reject
                typer.echo("\n".join(map(json.dumps, table.to_pylist())))
                continue
            if layer != (layer := table["layer"][0].as_py()):
                typer.echo(layer)
            typer.echo(format_rejects(table))
        if not as_json:
            reasons = join_largest(found.counts, num=len(found.counts))
            where = f" in {out}" if out is not None else ""
            number = count_noun(found.counts.total(), "reject")
            typer.echo(f"{number}{where}{f': {reasons}' if reasons else ''}")
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 0


def _show(summary: "StoreSummary", *, as_json: bool, clear: bool) -> None:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    plain = [asdict(layer) for layer in summary.layers]
    if as_json and clear:  # a line a look
        typer.echo(json.dumps({"time": now, "layers": plain}))
    elif as_json:
        typer.echo(json.dumps(plain, indent=2))
    else:
        on_terminal = typer.get_text_stream("stdout").isatty()
        head = f"{CLEAR if on_terminal else ''}{now}\n" if clear else ""
        typer.echo(head + summary.as_text())


def _write_page(path: Path, store: str, summary: "StoreSummary") -> None:
    from pipeline.report.page import Report, write_report

    now = datetime.now(UTC).isoformat(timespec="seconds")
    facts = {layer.folder: layer.as_text().partition("\n")[2] for layer in summary.layers}
    if summary.differences:
        facts["differences"] = "\n".join(summary.differences)
    report = Report(
        title=f"Store {store}",
        summary=f"{len(summary.layers)} layers, looked at {now}",
        facts=facts,
    )
    write_report(path, report)
