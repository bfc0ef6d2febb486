"""What commits hold: rows, and files by what they are: an array, or a file beside the arrays."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from pipeline.spec.layer import LayerSpec
from pipeline.store.commit import Commit
from pipeline.store.layout import GROUP, INDEX, list_arrays
from pipeline.store.store import Store

ROWS_OF = {"view": "views", "pair": "pairs", "prompt": "prompts"}
"""An array's first dimension to a commit's count of it."""


@dataclass(frozen=True)
class Committed:
    """What some tasks committed.

    ``rows``: by name, as a cost grows with them. ``files``: (layer's folder, array or file) to
    (rows, bytes) of each commit.
    """

    rows: Counter[str] = field(default_factory=Counter)
    files: dict[tuple[str, str], list[tuple[float, float]]] = field(default_factory=dict)


def count_committed(
    store_url: str, layers: Collection[LayerSpec], tasks: Collection[str]
) -> Committed:
    """Return the rows and the files' bytes of what these tasks committed in these layers."""
    store, found, prompts = Store.open(store_url), Committed(), set[str]()
    for layer in layers:
        dimensions = {name: kind.dimensions[0] for name, kind in list_arrays(layer).items()}
        for commit in store.read_commits(layer.folder):
            if commit.task not in tasks:
                continue
            if layer.kind == "latents":
                found.rows.update(commit.rows)
                assert commit.accounting is not None, "a latents commit has one"
                found.rows["samples"] += commit.accounting.samples
                found.rows["stored"] += commit.accounting.stored_samples
                prompts.update(store.read_index(commit)["prompt"].to_pylist())
            else:
                rows = commit.rows[ROWS_OF[dimensions["timestep"]]]
                found.rows["draws"] += rows * layer.features.num_draws
            found.rows["bytes"] += commit.num_bytes
            for name, num_bytes in add_files(commit).items():
                rows = commit.rows[rows_of_file(layer, name) or "pairs"]
                found.files.setdefault((layer.folder, name), []).append((rows, num_bytes))
    found.rows["new_prompts"] = len(prompts)
    return found


def add_files(commit: Commit) -> Counter[str]:
    """Return array or file → its bytes, an array's metadata with it."""
    found: Counter[str] = Counter()
    for file in commit.files:
        inside = PurePosixPath(file.path).parts[3:]  # below data/<task>/<attempt>
        in_array = inside[0] == GROUP and len(inside) > 2
        found[inside[1] if in_array else inside[-1]] += file.num_bytes
    return found


def rows_of_file(layer: LayerSpec, name: str) -> str | None:
    """Return what a file's bytes grow with: views, pairs or prompts; None for neither."""
    kinds = list_arrays(layer)
    if name in kinds:
        return ROWS_OF[kinds[name].dimensions[0]]
    return "pairs" if name == INDEX else None
