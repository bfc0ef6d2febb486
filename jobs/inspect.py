"""``ldznet inspect``: show what a store holds."""

import json
import time
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.options import AsJson, OptionalCorpus, Root, StoreUrl
from jobs.outputs import check_writable

if TYPE_CHECKING:
    from pipeline.store.store import Store
    from pipeline.upkeep.inspect import StoreSummary

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
) -> int:
    """List a store's layers: tasks, rows, bytes, rejects, what came lately, share of a corpus."""
    from pipeline.corpus.tasks import list_tasks
    from pipeline.store.store import Store
    from pipeline.upkeep.inspect import StoreInspector

    if html is not None:
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
    for look in count():
        if store.list_layers():
            return
        if look == 0:
            typer.echo(f"{store.storage.url}: waiting for the first layer", err=as_json)
        time.sleep(every_s)


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
