"""What is said of a store and its layers: counts, as lines to read or as plain data."""

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.base.progress_text import count_noun, format_rate, join_largest
from pipeline.corpus.notes import describe_notes
from pipeline.spec.layer import LayerSpec

_WRAP: dict[str, Any] = {
    "width": 80,
    "subsequent_indent": " " * 9,
    "break_long_words": False,
    "break_on_hyphens": False,
}


@dataclass(frozen=True)
class WindowSums:
    """What was committed in the last ``window_s`` seconds; sums are None where not all was read."""

    window: str
    window_s: int
    num_tasks: int
    num_pairs: int | None
    num_bytes: int | None
    # Of the window that the rate is over: where nothing is older, from its first commit until now.
    seconds: float = field(compare=False)

    def as_text(self) -> str:
        """Return ``10 min: 12 tasks, 340 pairs (0.57/s), 1.2 GB``; no rate of a single task."""
        text = f"{self.window}: {count_noun(self.num_tasks, 'task')}"
        if self.num_pairs is None or self.num_bytes is None:
            return f"{text}{self._say_rate(self.num_tasks)}"
        pairs = f"{count_noun(self.num_pairs, 'pair')}{self._say_rate(self.num_pairs)}"
        return f"{text}, {pairs}, {_format_bytes(self.num_bytes)}"

    def _say_rate(self, number: int) -> str:
        return f" ({format_rate(number / self.seconds)}/s)" if self.num_tasks > 1 else ""


@dataclass(frozen=True)
class LayerSummary:
    """One layer's committed work added up; bytes are of committed files.

    Of ``num_tasks`` that are committed the sums are of ``num_read``: of all, unless ``fast`` left
    out those whose records were not read yet. ``rejects`` are counts by reason, ``notes`` by name;
    ``num_untold`` tasks have records of version 1, which tell neither them nor rejected pairs.
    ``num_behind`` are tasks of the latents layer that have no features of their content here,
    ``num_corpus`` the tasks of the corpus asked for and ``num_of_corpus`` those committed; None
    where there is no such thing. ``num_retired`` tasks are not among the others. Times are by the
    storage's clock, None where it tells none.
    """

    folder: str
    model: str
    section: dict[str, Any]
    num_tasks: int
    rows: dict[str, int]
    num_masks: int
    num_ignores: int
    num_bytes: int
    stored_samples: int
    rejected_samples: int
    rejected_members: int
    rejected_pairs: int
    set_aside_members: int
    rejects: dict[str, int]
    notes: dict[str, int]
    num_untold: int
    num_read: int
    num_behind: int | None = None
    num_corpus: int | None = None
    num_of_corpus: int | None = None
    num_retired: int = 0
    newest: str | None = None  # ISO 8601, UTC
    recent: list[WindowSums] = field(default_factory=list)

    def as_text(self) -> str:
        """Return a few lines to read."""
        section = ", ".join(f"{key}: {_plain(value)}" for key, value in self.section.items())
        lines = [
            self.folder,
            f"  model  {self.model}",
            *textwrap.wrap(f"  spec   {section}", **_WRAP),
            f"  holds  {count_noun(self.num_tasks, 'task')}, {self._say_sums()}",
        ]
        if self.folder.startswith("latents-") and self._was_read:
            lines += self._say_input()
        if self.num_corpus is not None:
            lines.append(f"  corpus {self.num_of_corpus} of its {self.num_corpus} tasks committed")
        if self.num_corpus and self.num_tasks and not self.num_of_corpus:
            lines.append("         no task has an id of this corpus: give encode's --root, or its")
            lines.append("         --corpus; ids are of paths below the folder above the patterns")
        if self.num_behind:
            lines.append(f"  behind {count_noun(self.num_behind, 'task')} of its latents layer")
        if self.num_retired:
            lines.append(f"  retired {count_noun(self.num_retired, 'task')}, which nothing reads")
        if self.newest is not None:
            lines.append(f"  newest {self.newest}")
        shown = 0
        for recent in self.recent:
            if recent.num_tasks > shown:  # a longer window with nothing more says nothing more
                lines.append(f"  last   {recent.as_text()}")
                shown = recent.num_tasks
        return "\n".join(lines)

    @property
    def _was_read(self) -> bool:
        return self.num_read > 0 or self.num_tasks == 0

    def _say_input(self) -> list[str]:
        """Return what became of the tars' samples, and why."""
        text = f"  input  {self.stored_samples} samples stored, {self.rejected_samples} rejected"
        others = ((self.rejected_members, "other member"), (self.rejected_pairs, "pair"))
        if any(number for number, _ in others):
            counts = (count_noun(number, noun) for number, noun in others if number)
            text = f"{text}; {', '.join(counts)} rejected"
        if self.rejects:
            text = f"{text} ({join_largest(self.rejects, num=len(self.rejects))})"
            text = f"{text}; --rejects lists them"
        if self.set_aside_members:
            text = f"{text}; {count_noun(self.set_aside_members, 'sidecar')} set aside"
        lines = textwrap.wrap(text, **_WRAP)
        num_without = self.rows["pairs"] - self.num_masks
        if num_without or self.num_ignores:
            lines.append(
                f"  masks  {self.num_masks} pairs have one, {num_without} have none "
                "(negatives are among these)"
            )
        if self.num_ignores:
            lines.append(f"         {count_noun(self.num_ignores, 'view')} with an ignore region")
        if self.num_untold:
            tasks = count_noun(self.num_untold, "task")
            lines.append(f"         rejected pairs and reasons of {tasks} are not in the records,")
            lines.append("         which are of version 1; --rejects reads them")
        for note in describe_notes(self.notes):
            lines += textwrap.wrap(f"  note   {note}", **_WRAP)
        return lines

    def _say_sums(self) -> str:
        if not self._was_read:
            return "whose records were not read yet: run inspect without --fast once"
        rows = ", ".join(f"{count} {name}" for name, count in self.rows.items()) or "no rows"
        sums = f"{rows}, {_format_bytes(self.num_bytes)}"
        return sums if self.num_read == self.num_tasks else f"in {self.num_read} of them {sums}"


@dataclass(frozen=True)
class StoreSummary:
    """What a store holds at one time."""

    layers: list[LayerSummary]
    differences: list[str]  # lines

    def as_text(self) -> str:
        """Return lines to read."""
        return "\n".join([*(layer.as_text() for layer in self.layers), *self.differences])


def describe_differences(layers: Sequence[LayerSpec]) -> list[str]:
    """Return lines that say in which fields of their specs the layers of one kind differ."""
    lines: list[str] = []
    for kind in ("latents", "features"):
        fields = {x.folder: _flatten(x) for x in layers if x.kind == kind}
        if len(fields) < 2:
            continue
        lines.append(f"the {kind} layers differ in")
        for key in sorted({key for values in fields.values() for key in values}):
            found = {folder: values.get(key, "nothing") for folder, values in fields.items()}
            if len(set(found.values())) > 1:
                lines.append(f"  {key}")
                lines += [f"    {folder}  {value}" for folder, value in found.items()]
    return lines


def _flatten(layer: LayerSpec) -> dict[str, str]:
    """Return a layer's spec as one level of text: a file's digest by its path, the rest by name.

    Nothing of a spec is left out, so two layers always differ in something that is shown.
    """
    flat = {f"weights {path}": digest for path, digest in layer.canonical["weights"].items()}
    flat |= {key: json.dumps(value) for key, value in layer.section.items()}
    rest = {k: v for k, v in layer.canonical.items() if k not in ("weights", "section")}
    return flat | {key: json.dumps(value) for key, value in rest.items()}


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _format_bytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e10 else f"{num_bytes / 1e6:.1f} MB"
