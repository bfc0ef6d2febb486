"""Tars that held samples of which a run stored none: committed, but a sign that all of it is wrong.

A tar without samples (``group_members`` tells) is none of them. The parts of a long tar count
together: what grouping rejected is the first part's, which may have nothing else.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.base.progress_text import count_noun, join_largest
from pipeline.base.secrets import hide_secrets
from pipeline.store.task_ids import parse_part_id

if TYPE_CHECKING:  # a command that is interrupted needs no torch to be printed
    from pipeline.stage.work import TaskOutcome

_SPEC_ADVICE = {  # by the reasons that are the spec's and not the tar's
    "too_thin": "masks too_thin for the spec's size are kept at a larger one (size: ...)",
    "outside_view": "masks outside_view are kept with another crop (crop: resize or phrase)",
}


@dataclass(slots=True)
class _EmptyTar:
    """What a tar held of which nothing was stored, by its first task in this run."""

    task: str
    num_samples: int = 0
    rejects: Counter[str] = field(default_factory=Counter)


class EmptyTars:
    """Collects the tars of a run of which it stored nothing, from their tasks' outcomes."""

    def __init__(self) -> None:
        self._tars: dict[str, _EmptyTar] = {}
        self._stored: set[str] = set()  # long tars of which a part stored something

    def __len__(self) -> int:
        return len(self._tars)

    def add(self, outcome: "TaskOutcome") -> None:
        """Add a task that this run committed."""
        part = parse_part_id(outcome.task)
        tar = part[0] if part else outcome.task
        if outcome.num_samples:
            self._tars.pop(tar, None)
            if part:
                self._stored.add(tar)
        elif outcome.num_held and tar not in self._stored:
            empty = self._tars.setdefault(tar, _EmptyTar(outcome.task))
            empty.num_samples += outcome.num_held
            empty.rejects.update(outcome.rejects)

    def describe(self, urls: Mapping[str, str]) -> list[str]:
        """Return a line for each main reason, the most frequent first, that names its first tar.

        The last line says what to do.
        """
        alike: dict[str, list[_EmptyTar]] = {}
        for _, empty in sorted(self._tars.items()):
            reason = max(empty.rejects, key=lambda name: empty.rejects[name], default="no reason")
            alike.setdefault(reason, []).append(empty)
        lines = []
        for tars in sorted(alike.values(), key=len, reverse=True):
            first = tars[0]
            url = hide_secrets(urls.get(first.task, first.task))
            count = f" and of {len(tars) - 1} more alike" if len(tars) > 1 else ""
            held = count_noun(first.num_samples, "sample")
            lines.append(
                f"nothing stored of {url}{count}: {held}, rejected {join_largest(first.rejects)}"
            )
        lines += [advice for reason, advice in _SPEC_ADVICE.items() if reason in alike]
        if alike.keys() - _SPEC_ADVICE.keys():
            lines.append("once such a tar is mended, --changed renew encodes it anew")
        return lines
