"""Ids of tasks: a whole tar's, and those of the parts that a long tar is split into."""

import re
from collections.abc import Sequence

NUM_NAMED = 5
"""Tasks that a message names, of many."""
_PART_ID = re.compile(r"(?P<tar>.+)-p(?P<part>[0-9]{4,7})of(?P<num>[0-9]{4,7})", re.ASCII)


def part_suffix(part: int, num_parts: int) -> str:
    """Return what follows the tar's id in a part's: ``-p0003of0010``; nothing for a whole tar."""
    return f"-p{part:04d}of{num_parts:04d}" if num_parts > 1 else ""


def parse_part_id(task_id: str) -> tuple[str, int, int] | None:
    """Return tar id, part and number of parts of a part's task id; None for a whole tar's id.

    The two cannot be confused: a whole tar's id ends with hex digits of a hash.
    """
    match = _PART_ID.fullmatch(task_id)
    if match is None:
        return None
    tar_id, part, num_parts = match["tar"], int(match["part"]), int(match["num"])
    if part >= num_parts or task_id != tar_id + part_suffix(part, num_parts):
        return None
    return tar_id, part, num_parts


def list_part_ids(tar_id: str, num_parts: int) -> list[str]:
    """Return the task ids of a tar's parts, in order; of a tar that is not split, its own."""
    return [tar_id + part_suffix(part, num_parts) for part in range(num_parts)]


def name_some(ids: Sequence[str]) -> str:
    """Return the first few of some tasks' ids, and how many more there are."""
    more = f" and {len(ids) - NUM_NAMED} more" if len(ids) > NUM_NAMED else ""
    return ", ".join(ids[:NUM_NAMED]) + more


def describe_unmatched(
    option: str, patterns: Sequence[str], where: str, ids: Sequence[str], *, by_id: bool = True
) -> str:
    """Return that an option's patterns match none of a store's tasks, and what these are.

    ``where`` names the store, and ``ids`` are its tasks'; a few of them are named. ``by_id`` where
    the patterns are compared with ids alone, and not with what the tars are called.
    """
    given = ", ".join(map(repr, patterns))
    named = ", ".join(ids[:: max(1, -(-len(ids) // NUM_NAMED))])
    more = ", among them" if len(ids) > NUM_NAMED else ":"
    held = f"the store has {len(ids)}{more} {named}" if ids else "the store has no task"
    said = f"{option}: {given}: no task of {where} has such an id; {held}"
    if by_id and ids:
        stem = ids[0].rsplit("-", 1)[0]
        said += (
            ". A task's id is its tar's name, without folders and .tar, and a hash; a pattern of "
            f"ids has *, ? and [] alone, as '{stem}-*'"
        )
    return said
