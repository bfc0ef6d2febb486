"""``ldznet inspect``: what a store holds."""

import json
from typing import Annotated

import typer


def inspect(
    store: Annotated[str, typer.Argument(help="The store's folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """List a store's layers with their tasks, rows, bytes and rejects."""
    from pipeline.inspect_store import describe_differences, inspect_store
    from pipeline.store import Store

    layers = inspect_store(store)
    if as_json:
        typer.echo(json.dumps([layer.as_dict() for layer in layers], indent=2))
        return 0
    for layer in layers:
        typer.echo(layer.as_text())
    for line in describe_differences(Store.open(store).list_layers()):
        typer.echo(line)
    return 0
