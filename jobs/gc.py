"""``ldznet gc``: remove what killed writers left behind."""

from typing import Annotated

import typer

from jobs.options import StoreUrl


def gc(
    store: StoreUrl,
    dry_run: Annotated[bool, typer.Option(help="Only list them; remove nothing.")] = False,
) -> int:
    """Remove attempts that another writer's commit made useless; safe while other jobs run."""
    from pipeline.store.store import Store
    from pipeline.upkeep.gc import list_orphans, remove_orphans

    opened = Store.open(store)
    orphans = list_orphans(opened)
    num, num_bytes = 0, 0
    for orphan in orphans if dry_run else remove_orphans(opened, orphans):
        num, num_bytes = num + 1, num_bytes + orphan.num_bytes
        typer.echo(f"{'would remove' if dry_run else 'removed'} {orphan.path}")
    done = "to remove" if dry_run else "removed"
    typer.echo(f"{num} orphans {done}, {num_bytes / 1e6:.1f} MB")
    return 0
