"""Failed tasks: a line each in ``failed.jsonl`` as they fail, and a summary by kind at the end.

The list is for people and other programs. Nothing reads it to try the tasks again: the same command
encodes whatever is not committed.
"""

import json
import logging
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from pipeline.base.progress import open_lines
from pipeline.base.secrets import URL_SCHEME, hide_secrets

if TYPE_CHECKING:  # a command that is interrupted needs no torch to be printed
    from pipeline.stage.work import TaskOutcome

logger = logging.getLogger(__name__)

MAX_LISTED = 20  # kinds of failures in the summary
_MAX_LISTED_CHARACTERS, _MAX_SUMMARY_CHARACTERS = 4000, 300  # of a reason
_VARYING = re.compile(rf"{URL_SCHEME}\S+|/\S+|\b[0-9a-f]{{8,}}\b|\d+")


class FailureLog:
    """JSON lines file of failed tasks, created when the first one fails.

    Each task is one write of a whole line at the file's end, so that a kill leaves whole lines. If
    the file cannot be written a warning is logged once and the run goes on without it.
    """

    def __init__(self, path: Path | None, *, urls: Mapping[str, str]) -> None:
        """``urls`` gives a task's tar; without a path nothing is written."""
        self._path = path
        self._urls = urls
        self._file: BinaryIO | None = None

    def add(self, outcome: "TaskOutcome") -> None:
        """Append a task if it failed for good."""
        if outcome.status != "failed" or self._path is None:
            return
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "task": outcome.task,
            "url": hide_secrets(self._urls.get(outcome.task, "")),
            "cause": outcome.cause,
            "node": outcome.node,
            "ray_node": outcome.ray_node,
            "reason": hide_secrets(outcome.error[:_MAX_LISTED_CHARACTERS]),
        }
        try:
            if self._file is None:
                self._file = open_lines(self._path)
            self._file.write(json.dumps(line).encode() + b"\n")
        except OSError as error:
            logger.warning("%s: failed tasks cannot be listed any more: %s", self._path, error)
            self._path = None

    @property
    def path(self) -> str | None:
        """The file, or None where nothing failed or it could not be written."""
        return str(self._path) if self._path and self._file else None

    def close(self) -> None:
        """Close the file; nothing may be added after that."""
        if self._file is not None:
            self._file.close()


def describe_failures(failures: Mapping[str, str], *, urls: Mapping[str, str]) -> list[str]:
    """Return a line for each kind of failure, the most frequent first, at most ``MAX_LISTED``.

    Failures (task → reason) are of one kind if their reasons differ in names and numbers alone. A
    second line has the URL of the kind's first tar, by ``urls`` (task → URL), unless the reason
    has it.
    """
    kinds: dict[str, list[str]] = {}
    for task, reason in sorted(failures.items()):
        kind = _VARYING.sub("#", reason[:_MAX_LISTED_CHARACTERS].replace(task, "#"))
        kinds.setdefault(kind, []).append(task)
    ranked = sorted(kinds.values(), key=len, reverse=True)
    lines = []
    for tasks in ranked[:MAX_LISTED]:
        reason = hide_secrets(failures[tasks[0]][:_MAX_LISTED_CHARACTERS])
        if len(reason) > _MAX_SUMMARY_CHARACTERS:
            reason = f"{reason[:_MAX_SUMMARY_CHARACTERS]}…"
        count = f" and {len(tasks) - 1} more alike" if len(tasks) > 1 else ""
        lines.append(f"failed {tasks[0]}{count}: {reason}")
        url = hide_secrets(urls.get(tasks[0], ""))
        if url and url not in reason:
            lines.append(f"  {url}")
    if len(ranked) > MAX_LISTED:
        num_tasks = sum(len(tasks) for tasks in ranked[MAX_LISTED:])
        lines.append(f"failed {num_tasks} more, of {len(ranked) - MAX_LISTED} other kinds")
    return lines
