"""``ldznet snapshot``: keep a list of what is committed now."""

from typing import Annotated

import typer

from jobs.options import StoreUrl


def snapshot(
    store: StoreUrl,
    layer: Annotated[
        list[str] | None, typer.Option(help="A layer's folder; repeatable. Default: all layers.")
    ] = None,
) -> int:
    """Write the list of the newest commits; a training config names it in data.snapshot."""
    from pipeline.base.progress_text import count_noun
    from pipeline.base.yaml import SpecError
    from pipeline.store.snapshot import create_snapshot
    from pipeline.store.store import Store

    opened = Store.open(store)
    folders = [found.folder for found in opened.list_layers(required=True)]
    if unknown := sorted(set(layer or ()) - set(folders)):
        raise SpecError(
            f"--layer: expected one of {', '.join(folders)}, got {', '.join(unknown)}; "
            f"these are the layers of {store}"
        )
    made = create_snapshot(opened, layer or folders)
    if made.refused:
        raise OSError(
            f"{store}: snapshot {made.digest} could not be written there: {made.refused}; train "
            "and sweep need none to be there, and keep one with the run"
        )
    for folder, records in sorted(made.records.items()):
        typer.echo(f"{folder}: {count_noun(len(records), 'task')}")
    typer.echo(f"snapshot {made.digest}")
    return 0
