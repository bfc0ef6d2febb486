"""Reading committed pairs as batches of tensors.

Data flow: a snapshot's commits -> the indexes of the tasks chosen, joined -> a pair number ->
(task, row) -> the chunks that a head needs, a ranged read each -> stacked tensors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from models.quantize import dequantize_int8
from pipeline.arrays import ShardedArray
from pipeline.commit import Commit, DamagedStoreError, read_commit
from pipeline.layout import block_name
from pipeline.spec import LayerSpec, SpecError
from pipeline.store import Snapshot, Store

_INDEX_COLUMNS = ("key", "view", "phrase", "latent_row", "text_row", "mask_area")


@dataclass(frozen=True)
class Source:
    """What is read: the layers, and the snapshot of their commits."""

    store: Store
    latents: LayerSpec
    features: LayerSpec | None
    snapshot: Snapshot


@dataclass(frozen=True)
class Batch:
    """Some pairs, in the order asked for.

    ``inputs`` has what was asked for of: latent (B, 4, h, w) float32, the posterior mean times the
    scaling factor; text (B, T, D) float32, with text_pooled (B, P) float32 where the layer's model
    has it (SDXL); image (B, H, W, 3) uint8; features, block number → (B, C, h, w) float32.
    ``mask`` is (B, H, W) uint8 of 0 and 1.
    """

    inputs: dict[str, Any]
    mask: Tensor
    keys: tuple[str, ...]
    phrases: tuple[str, ...]


class PairReader:
    """The pairs of the tasks that match a glob, by number from 0, in task and row order."""

    def __init__(
        self,
        source: Source,
        *,
        tasks: str,
        inputs: frozenset[str],
        blocks: Sequence[int] = (),
    ) -> None:
        self._source = source
        self._inputs = inputs
        self._blocks = tuple(blocks)
        self._check_inputs()
        self._text_names = source.latents.text_arrays if "text" in inputs else ()
        self._latents = self._read_commits(source.latents, tasks)
        self._features = self._match_features(tasks)
        tables = [source.store.read_index(c).select(_INDEX_COLUMNS) for c in self._latents]
        self._starts = np.cumsum([0, *(table.num_rows for table in tables)])
        if not self._starts[-1]:
            held = ", ".join(r.task for r in source.snapshot.records[source.latents.folder][:5])
            raise SpecError(
                f"tasks {tasks!r}: expected at least one committed pair in "
                f"{source.store.storage.url}, got none; the store holds {held or 'no tasks'} …"
            )
        self.index = pa.concat_tables(tables)
        self._columns = {name: self.index[name].to_numpy() for name in ("latent_row", "text_row")}
        self._open: dict[tuple[int, str], ShardedArray] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def tasks(self) -> tuple[str, ...]:
        """The ids of the tasks that the pairs are of."""
        return tuple(commit.task for commit in self._latents)

    @property
    def num_draws(self) -> int:
        """Draws stored a pair; 1 where no features are read."""
        return self._source.features.features.num_draws if self._source.features else 1

    def _check_inputs(self) -> None:
        latents, features = self._source.latents, self._source.features
        if "image" in self._inputs and not latents.latents.keep_image:
            raise SpecError(
                f"{latents.folder}: expected the views' images, which this head reads, but the "
                "layer was encoded with keep_image: false; encode one with keep_image: true"
            )
        if "features" not in self._inputs:
            return
        if features is None:
            raise SpecError(
                f"{self._source.store.storage.url}: this head reads features, but there is no "
                "features layer; encode one with a features: section in the spec"
            )
        missing = sorted(set(self._blocks) - set(features.features.blocks))
        if missing:
            raise SpecError(
                f"{features.folder}: expected blocks {list(self._blocks)}, which the head reads, "
                f"but {missing} were not encoded; encode a layer with them, or choose among "
                f"{list(features.features.blocks)}"
            )

    def _read_commits(self, layer: LayerSpec, tasks: str) -> list[Commit]:
        records = self._source.snapshot.records[layer.folder]
        chosen = [record for record in records if fnmatchcase(record.task, tasks)]
        return [read_commit(self._source.store.storage, layer.folder, r) for r in chosen]

    def _match_features(self, tasks: str) -> dict[str, Commit]:
        features = self._source.features
        if features is None or "features" not in self._inputs:
            return {}
        commits = {commit.task: commit for commit in self._read_commits(features, tasks)}
        for latents in self._latents:
            over = commits.get(latents.task)
            if over is None:
                raise SpecError(
                    f"{features.folder}: task {latents.task} has latents but no features; "
                    "run encode again with the same spec to add them"
                )
            if over.pairs_sha256 != latents.pairs_sha256:
                raise DamagedStoreError(f"{over.name}: its rows are not those of {latents.name}")
        return commits

    def read(self, numbers: Sequence[int] | np.ndarray, *, draws: Sequence[int]) -> Batch:
        """Read pairs by number, each with one of its draws.

        Raises:
            DamagedStoreError: a chunk is missing or damaged; names file and row.
        """
        found = [self._read_pair(int(n), d) for n, d in zip(numbers, draws, strict=True)]
        names = self._inputs.union(self._text_names)
        inputs = {name: _stack([pair[name] for pair in found]) for name in names}
        rows = self.index.take(pa.array(np.asarray(numbers)))
        return Batch(
            inputs=inputs,
            mask=_stack([pair["mask"] for pair in found]),
            keys=tuple(rows["key"].to_pylist()),
            phrases=tuple(rows["phrase"].to_pylist()),
        )

    def read_masks(self, numbers: Sequence[int] | np.ndarray) -> Tensor:
        """Read the masks of some pairs alone: (n, H, W) uint8 of 0 and 1."""
        rows = [self._locate(int(number)) for number in numbers]
        return _stack([torch.tensor(self._array(t, "mask").read_row(row)) for t, row in rows])

    def _locate(self, number: int) -> tuple[int, int]:
        task = int(np.searchsorted(self._starts, number, side="right")) - 1
        return task, number - int(self._starts[task])

    def _read_pair(self, number: int, draw: int) -> dict[str, Any]:
        task, row = self._locate(number)
        latent_row = int(self._columns["latent_row"][number])
        values: dict[str, Any] = {"mask": torch.tensor(self._array(task, "mask").read_row(row))}
        if "latent" in self._inputs:
            latent = torch.tensor(self._array(task, "latent_mean").read_row(latent_row))
            values["latent"] = latent.float() * self._source.latents.scaling_factor
        text_row = int(self._columns["text_row"][number])
        for name in self._text_names:
            values[name] = torch.tensor(self._array(task, name).read_row(text_row)).float()
        if "image" in self._inputs:
            values["image"] = torch.tensor(self._array(task, "image").read_row(latent_row))
        if "features" in self._inputs:
            values["features"] = self._read_features(task, row, latent_row, draw)
        return values

    def _read_features(self, task: int, row: int, latent_row: int, draw: int) -> dict[int, Tensor]:
        assert self._source.features is not None
        spec = self._source.features.features
        row = row if spec.condition == "phrase" else latent_row
        features = {}
        for number in self._blocks:
            name = block_name(number)
            feature = torch.tensor(self._array(task, name).read_chunk(row, draw))
            if spec.storage == "int8":
                scale = self._array(task, f"{name}_scale").read_chunk(row, draw)
                feature = dequantize_int8(feature, torch.tensor(scale))
            features[number] = feature.float()
        return features

    def _array(self, task: int, name: str) -> ShardedArray:
        if (task, name) not in self._open:
            latents = self._latents[task]
            if name.startswith("block"):
                assert self._source.features is not None
                layer, commit = self._source.features, self._features[latents.task]
            else:
                layer, commit = self._source.latents, latents
            self._open[task, name] = self._source.store.open_array(layer, commit, name)
        return self._open[task, name]


def _stack(values: Sequence[Any]) -> Any:
    if isinstance(values[0], Mapping):
        return {key: torch.stack([value[key] for value in values]) for key in values[0]}
    return torch.stack(list(values))


def move_inputs(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a batch's inputs on a device."""
    return {
        name: {key: x.to(device) for key, x in value.items()}
        if isinstance(value, Mapping)
        else value.to(device)
        for name, value in inputs.items()
    }


def choose_layers(
    store: Store, *, latents: str | None, features: str | None, reads_features: bool
) -> tuple[LayerSpec, LayerSpec | None]:
    """Return the layers to read: those named, or the only ones that fit.

    Names are a layer's folder or its fingerprint.

    Raises:
        SpecError: none fits, or several do and none is named; lists them.
    """
    layers = store.list_layers()
    if reads_features:
        over = _choose_one(store, [x for x in layers if x.kind == "features"], "features", features)
        if latents and not over.latents_folder.endswith(latents):
            raise SpecError(f"{over.folder}: is over {over.latents_folder}, not over {latents}")
        return store.read_layer(over.latents_folder), over
    only = [layer for layer in layers if layer.kind == "latents"]
    return _choose_one(store, only, "latents", latents), None


def _choose_one(
    store: Store, layers: Sequence[LayerSpec], kind: str, name: str | None
) -> LayerSpec:
    found = [layer for layer in layers if name is None or layer.folder.endswith(name)]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(layer.folder for layer in layers) or "none"
    wanted = f"a {kind} layer {name!r}" if name else f"one {kind} layer"
    raise SpecError(
        f"{store.storage.url}: expected {wanted}, got {listed}; "
        f"name one under {kind}: in the training config"
    )
