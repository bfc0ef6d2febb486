"""What a store holds, from its specs and commit records alone."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.spec import LayerSpec, SpecError
from pipeline.store import Store


@dataclass(frozen=True)
class LayerSummary:
    """One layer's committed work added up; bytes are of committed files."""

    folder: str
    model: str
    section: dict[str, Any]
    num_tasks: int
    rows: dict[str, int]
    num_bytes: int
    stored_samples: int
    rejected_samples: int
    rejected_members: int

    def as_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    def as_text(self) -> str:
        """Return a few lines to read."""
        rows = ", ".join(f"{count} {name}" for name, count in self.rows.items()) or "no rows"
        section = ", ".join(f"{key}: {value}" for key, value in self.section.items())
        lines = [
            self.folder,
            f"  model  {self.model}",
            f"  spec   {section}",
            f"  holds  {self.num_tasks} tasks, {rows}, {self.num_bytes / 1e6:.1f} MB",
        ]
        if self.folder.startswith("latents-"):
            lines.append(
                f"  input  {self.stored_samples} samples stored, {self.rejected_samples} rejected, "
                f"{self.rejected_members} other members rejected"
            )
        return "\n".join(lines)


def inspect_store(url: str) -> list[LayerSummary]:
    """Summarise every layer of a store.

    Raises:
        SpecError: there is no store.
        DamagedStoreError: a spec or a commit record cannot be read.
    """
    return summarise_store(Store.open(url))


def summarise_store(store: Store) -> list[LayerSummary]:
    """Summarise every layer of an opened store; raises as ``inspect_store``."""
    layers = store.list_layers()
    if not layers:
        raise SpecError(f"{store.storage.url}: expected a store, found no layer there")
    return [_summarise(store, layer) for layer in layers]


def describe_differences(layers: Sequence[LayerSpec]) -> list[str]:
    """Return lines that say in which fields of their specs the layers of one kind differ."""
    lines: list[str] = []
    for kind in ("latents", "features"):
        fields = {x.folder: _flatten(x.canonical) for x in layers if x.kind == kind}
        if len(fields) < 2:
            continue
        lines.append(f"the {kind} layers differ in")
        for key in sorted({key for values in fields.values() for key in values}):
            found = {folder: values.get(key, "nothing") for folder, values in fields.items()}
            if len(set(found.values())) > 1:
                lines.append(f"  {key}")
                lines += [f"    {folder}  {value}" for folder, value in found.items()]
    return lines


def _flatten(canonical: Mapping[str, Any]) -> dict[str, str]:
    """Return a canonical spec as one level of text: a file's digest by its path, the rest by name.

    Nothing of a spec is left out, so two layers always differ in something that is shown.
    """
    flat = {f"weights {path}": digest for path, digest in canonical["weights"].items()}
    flat |= {key: json.dumps(value) for key, value in canonical["section"].items()}
    rest = {k: v for k, v in canonical.items() if k not in ("weights", "section")}
    return flat | {key: json.dumps(value) for key, value in rest.items()}


def _summarise(store: Store, layer: LayerSpec) -> LayerSummary:
    rows: Counter[str] = Counter()
    samples: Counter[str] = Counter()
    num_tasks = num_bytes = 0
    for commit in store.read_commits(layer.folder):
        num_tasks += 1
        num_bytes += commit.num_bytes
        rows.update(commit.rows)
        if commit.accounting is not None:
            samples.update(commit.accounting.model_dump())
    return LayerSummary(
        folder=layer.folder,
        model=str(layer.source["model"]),
        section=layer.canonical["section"],
        num_tasks=num_tasks,
        rows=dict(rows),
        num_bytes=num_bytes,
        stored_samples=samples["stored_samples"],
        rejected_samples=samples["rejected_samples"],
        rejected_members=samples["rejected_members"],
    )
