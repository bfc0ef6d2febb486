"""``ldznet inspect``: what a store holds."""

import json
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipeline.upkeep.inspect import StoreSummary

CLEAR = "\x1b[H\x1b[2J"


def inspect(
    store: Annotated[str, typer.Argument(help="The store's folder or s3:// URL.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    html: Annotated[Path | None, typer.Option(help="A page to write, beside the text.")] = None,
    fast: Annotated[
        bool,
        typer.Option("--fast", help="List alone: sums are of the records that are known already."),
    ] = False,
    corpus: Annotated[
        list[str] | None,
        typer.Option(help="Tars as for encode: says how much of them is there; repeatable."),
    ] = None,
    root: Annotated[str | None, typer.Option(help="As given to encode.")] = None,
    watch: Annotated[
        float | None, typer.Option(min=1.0, help="Look again every so many seconds, until Ctrl-C.")
    ] = None,
) -> int:
    """List a store's layers with their tasks, rows, bytes, rejects and what came lately."""
    from jobs.outputs import check_writable
    from pipeline.corpus.tasks import list_tasks
    from pipeline.store.store import Store
    from pipeline.upkeep.inspect import StoreInspector

    if html is not None:
        check_writable("--html", html)
    tars = list_tasks(corpus, root=root) if corpus else []
    inspector = StoreInspector(Store.open(store))
    try:
        while True:
            summary = inspector.look(fast=fast, tars=tars)
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
