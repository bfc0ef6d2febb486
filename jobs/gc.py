"""``ldznet gc``: remove what killed writers left behind and what retired tasks held."""

import logging
from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.options import StoreUrl

if TYPE_CHECKING:
    from pipeline.store.store import Store

logger = logging.getLogger(__name__)


def gc(
    store: StoreUrl,
    dry_run: Annotated[bool, typer.Option(help="Only list them; remove nothing.")] = False,
) -> int:
    """Remove useless attempts and the files of retired tasks; safe while other jobs run."""
    from pipeline.base.progress_text import count_noun
    from pipeline.store.store import Store
    from pipeline.upkeep.gc import list_orphans, remove_orphans

    opened = Store.open(store)
    orphans = list_orphans(opened)
    num: Counter[bool] = Counter()  # by whether they are of retired tasks
    num_bytes: Counter[bool] = Counter()
    for orphan in orphans if dry_run else remove_orphans(opened, orphans):
        num[orphan.is_retired] += 1
        num_bytes[orphan.is_retired] += orphan.num_bytes
        typer.echo(f"{'would remove' if dry_run else 'removed'} {orphan.path}")
    done = "to remove" if dry_run else "removed"
    typer.echo(f"{count_noun(num[False], 'orphan')} {done}, {num_bytes[False] / 1e6:.1f} MB")
    if num[True]:
        folders = count_noun(num[True], "folder")
        typer.echo(f"files of retired tasks {done}: {folders}, {num_bytes[True] / 1e6:.1f} MB")
    _remove_uploads(opened, dry_run)
    return 0


def _remove_uploads(store: "Store", dry_run: bool) -> None:
    """Abort the useless uploads that killed writers left on S3, and tell of all that are there."""
    from pipeline.upkeep.gc import list_uploads

    num_bytes: dict[bool, list[int]] = {True: [], False: []}
    try:
        for upload, useless in list_uploads(store):
            if useless and not dry_run:
                upload.abort()
            num_bytes[useless].append(upload.num_bytes)
    except (OSError, ValueError) as error:  # what gc did beside it stands
        logger.warning("uploads that killed writers left are not removed: %s", error)
    if useless_bytes := num_bytes[True]:
        done = "to abort" if dry_run else "aborted"
        typer.echo(f"{len(useless_bytes)} uploads {done}, {sum(useless_bytes) / 1e6:.1f} MB")
    if other_bytes := num_bytes[False]:
        typer.echo(
            f"{len(other_bytes)} uploads stay, {sum(other_bytes) / 1e6:.1f} MB: their tasks have "
            "no commit yet, so a writer may be at work. Once encode has committed them, gc aborts "
            "them; the bucket's lifecycle rule does it in any case (docs/cluster.md)"
        )
