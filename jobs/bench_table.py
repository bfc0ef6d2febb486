"""How a benchmark's rows are printed: a table in Markdown, or JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def plain_rows(rows: Sequence[Any]) -> list[dict[str, Any]]:
    """Return dataclass instances as dictionaries."""
    return [asdict(row) for row in rows]


def print_rows(rows: Sequence[Any], as_json: bool) -> None:
    """Print dataclass instances, a row each."""
    from pipeline.report.markdown import format_table

    typer.echo(
        json.dumps(plain_rows(rows), indent=2) if as_json else format_table(plain_rows(rows))
    )
