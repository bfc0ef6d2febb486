"""Rows and bytes of commits, by array or file."""

from collections import Counter, defaultdict
from pathlib import PurePosixPath

from pipeline.spec.layer import LayerSpec
from pipeline.store.commit import Commit
from pipeline.store.layout import GROUP, INDEX, ROWS_OF_DIMENSION, list_arrays


class Committed:
    """What some commits hold.

    Attributes:
        rows: number of samples, views, pairs, masks, prompts, draws and bytes: what a cost can grow
            with; and of members that were set aside.
        files: (layer's folder, array or file) to (rows, bytes) of each commit.
    """

    def __init__(self) -> None:
        self.rows: Counter[str] = Counter()
        self.files: defaultdict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)

    def add(self, layer: LayerSpec, commit: Commit) -> None:
        """Add one commit of a layer."""
        if layer.kind == "latents":
            self.rows.update(commit.rows)
            assert commit.accounting is not None, "a latents commit has one"
            self.rows["samples"] += commit.accounting.samples
            self.rows["stored"] += commit.accounting.stored_samples
            self.rows["set_aside"] += commit.accounting.set_aside_members
        else:
            rows = commit.rows[ROWS_OF_DIMENSION[list_arrays(layer)["timestep"].dimensions[0]]]
            self.rows["draws"] += rows * layer.features.num_draws
        self.rows["bytes"] += commit.num_bytes
        sizes: Counter[str] = Counter()  # by array, its metadata included, or file
        for file in commit.files:
            inside = PurePosixPath(file.path).parts[3:]  # below data/<task>/<attempt>
            in_array = inside[0] == GROUP and len(inside) > 2
            sizes[inside[1] if in_array else inside[-1]] += file.num_bytes
        for name, num_bytes in sizes.items():
            rows = commit.rows[rows_of_file(layer, name) or "pairs"]
            self.files[layer.folder, name].append((rows, num_bytes))


def rows_of_file(layer: LayerSpec, name: str) -> str | None:
    """Return what a file's bytes grow with, by the name in a commit's rows; None for nothing."""
    if name == INDEX:
        return "pairs"
    kinds = list_arrays(layer, {"ignores": 1})
    return ROWS_OF_DIMENSION[kinds[name].dimensions[0]] if name in kinds else None
