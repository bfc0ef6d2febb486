"""``ldznet rm``: take tasks out of a store's use, or back into it."""

from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.options import StoreUrl

if TYPE_CHECKING:
    from pipeline.store.store import Store
    from pipeline.upkeep.rm import LayerTasks

_SHOWN = 20  # tasks of a layer


def rm(
    store: StoreUrl,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="Tasks to retire: a glob of their id, or of their tar's URL, path or name; "
            "repeatable."
        ),
    ] = None,
    unretire: Annotated[
        bool, typer.Option("--unretire", help="Take it back: they are read again.")
    ] = False,
    dry_run: Annotated[bool, typer.Option(help="Only list them; change nothing.")] = False,
) -> int:
    """Retire tasks, whose tars were withdrawn or renamed, in all layers: nothing reads them."""
    from pipeline.store.store import Store
    from pipeline.upkeep.rm import find_tasks

    if not task:
        raise ValueError("--task: expected a pattern of the tasks to retire, got none")
    opened = Store.open(store)
    for found in find_tasks(opened, task, returns=unretire):
        if not dry_run:
            _change(opened, found)
            continue
        typer.echo(_describe(found, "to be taken back" if unretire else "to be retired"))
        for some in found.tasks[:_SHOWN]:
            typer.echo(f"  {some.record.task}")
        if len(found.tasks) > _SHOWN:
            typer.echo(f"  … and {len(found.tasks) - _SHOWN} more")
    if not dry_run and not unretire:
        typer.echo(
            "Nothing reads them any more but snapshots taken before, and encode leaves their tars "
            "alone; --unretire takes it back. Their bytes stay until ldznet gc, and for as long as "
            "a snapshot names them"
        )
    return 0


def _change(store: "Store", found: "LayerTasks") -> None:
    from pipeline.base.progress import Progress
    from pipeline.upkeep.rm import change_tasks

    became: Counter[str | None] = Counter()
    if total := len(found.tasks):
        with Progress("rm", total=total, unit="tasks", metrics_path=None) as progress:
            for some in change_tasks(store, found):
                became.update(some)
                progress.update(became.total())
    typer.echo(_describe(found, "taken back" if found.returns else "retired"))
    if num := became["vacant"]:
        typer.echo(f"  {num} of them without their files, which gc has removed: run encode again")


def _describe(found: "LayerTasks", done: str) -> str:
    from pipeline.base.progress_text import count_noun

    pairs = count_noun(sum(task.num_pairs for task in found.tasks), "pair")
    num_mb = sum(task.num_bytes for task in found.tasks) / 1e6
    line = f"{found.layer}: {count_noun(len(found.tasks), 'task')} {done}, {pairs}, {num_mb:.1f} MB"
    return f"{line} ({found.num_done} already)" if found.num_done else line
