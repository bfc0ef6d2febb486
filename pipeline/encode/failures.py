"""Tasks that failed, set aside: a line each in ``failed.jsonl`` as it happens, their kinds at last.

The list is for reading and for other programs. To try them again needs no list: the same command
does what is not committed.
"""

import json
import logging
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Self

from pipeline.base.progress import open_lines
from pipeline.base.secrets import URL_SCHEME, hide_secrets

if TYPE_CHECKING:  # a command that is interrupted needs no torch to be printed
    from pipeline.stage.work import TaskOutcome


logger = logging.getLogger(__name__)
MAX_LISTED = 20  # kinds of failures named at the end
_LONG, _SHORT = 4000, 300  # characters of a reason: in the list, and at the end
_VARYING = re.compile(rf"{URL_SCHEME}\S+|/\S+|\b[0-9a-f]{{8,}}\b|\d+")


class SetAside:
    """The file of failed tasks, made when the first one fails.

    Each is one write of a whole line to the file's end, so that a kill leaves whole lines. A file
    that cannot be written is given up with one logged warning: it never stops the work.
    """

    def __init__(self, path: Path | None, *, urls: Mapping[str, str]) -> None:
        """``urls`` are those of the run's tars, by task; without a path nothing is listed."""
        self.path = path
        self._urls = urls
        self._file: BinaryIO | None = None
        self._given_up = False

    def add(self, outcome: "TaskOutcome") -> None:
        """Append a task where it failed; do nothing where it did not."""
        if outcome.status != "failed" or self._given_up or self.path is None:
            return
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "task": outcome.task,
            "url": hide_secrets(self._urls.get(outcome.task, "")),
            "reason": hide_secrets(outcome.error[:_LONG]),
        }
        try:
            if self._file is None:
                self._file = open_lines(self.path)
            self._file.write(json.dumps(line).encode() + b"\n")
        except OSError as error:
            self._given_up = True
            logger.warning("%s: failed tasks cannot be listed any more: %s", self.path, error)

    @property
    def listed(self) -> str | None:
        """Where the list is, None where nothing failed or it could not be written."""
        return str(self.path) if self._file is not None and not self._given_up else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()


def describe_failures(
    failures: Mapping[str, str], *, urls: Mapping[str, str] | None = None
) -> list[str]:
    """Return a line for each kind of failure, the most frequent first, at most ``MAX_LISTED``.

    Failures are of one kind where their reasons (task → reason) differ in names and numbers alone.
    Below each is where its first tar is, by ``urls`` (task → URL), unless the reason says it.
    """
    kinds: dict[str, list[str]] = {}
    for task, reason in sorted(failures.items()):
        kind = _VARYING.sub("#", reason[:_LONG].replace(task, "#"))
        kinds.setdefault(kind, []).append(task)
    ranked = sorted(kinds.values(), key=len, reverse=True)
    lines = []
    for tasks in ranked[:MAX_LISTED]:
        reason = hide_secrets(failures[tasks[0]][:_LONG])
        reason = reason if len(reason) <= _SHORT else f"{reason[:_SHORT]}…"
        count = f" and {len(tasks) - 1} more alike" if len(tasks) > 1 else ""
        lines.append(f"failed {tasks[0]}{count}: {reason}")
        url = hide_secrets((urls or {}).get(tasks[0], ""))
        if url and url not in reason:
            lines.append(f"  {url}")
    if len(ranked) > MAX_LISTED:
        num_tasks = sum(len(tasks) for tasks in ranked[MAX_LISTED:])
        lines.append(f"failed {num_tasks} more, of {len(ranked) - MAX_LISTED} other kinds")
    return lines
