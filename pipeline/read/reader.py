"""Reading committed pairs as batches of tensors.

Data flow: a snapshot's commits -> a pair number's task and row -> the rows of the arrays that a
head reads -> gathered into one tensor an array -> a batch.
"""

import fnmatch
import re
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.base.yaml import SpecError
from pipeline.read.batch import LazyPairBatch, PairBatch, QuantizedFeature, collect_features, widen
from pipeline.read.choice import PairChoice
from pipeline.read.commits import LayerCommits, open_features
from pipeline.read.gather import Gather, RowGatherer
from pipeline.read.pair_index import PairIndex
from pipeline.read.source import Source
from pipeline.read.view_samples import check_numbers
from pipeline.store.array_reader import ShardedArray
from pipeline.store.layout import block_name

_EVERY_PAIR = PairChoice()


class PairReader:
    """The chosen pairs of the tasks that match a glob, by number from 0, in task and row order.

    Threads may share a reader; another process gets its own, which pickling makes.

    Args:
        source: the layers and the snapshot.
        tasks: one or more globs over task ids.
        inputs: what of a pair is read: latent, text, image, features.
        blocks: whose features are read.
        choice: which pairs of the tasks.
        device: where batches go: for CUDA their memory is pinned.
        num_threads: reads at once; by default as many as the storage wants.
        views: ``every``: each stored view of a pair is a sample of an epoch. ``one``: each (key,
            phrase) yields one stored view an epoch (a crop, perhaps mirrored), see
            ``choose_pairs``.

    Raises:
        SpecError: the layers do not hold what is read, or no pair is chosen.
        DamagedStoreError: a commit record is damaged, or features are of other pairs.
    """

    def __init__(
        self,
        source: Source,
        *,
        tasks: str | Sequence[str],
        inputs: frozenset[str],
        blocks: Sequence[int] = (),
        choice: PairChoice = _EVERY_PAIR,
        device: torch.device | None = None,
        num_threads: int | None = None,
        views: Literal["every", "one"] = "every",
    ) -> None:
        self._source = source
        self._inputs = inputs
        self._blocks = tuple(blocks)
        self._check_inputs()
        self._text_names = source.latents.text_arrays if "text" in inputs else ()
        views_of = {"latent": "latent_mean", "image": "image"}
        self._view_names = [name for read, name in views_of.items() if read in inputs]
        globs = (tasks,) if isinstance(tasks, str) else tuple(tasks)
        matches = re.compile("|".join(map(fnmatch.translate, globs)) or "(?!)").match
        held = source.snapshot.records[source.latents.folder]
        records = [record for record in held if matches(record.task)]
        latents = source.latents.latents
        several = latents.views > 1 or latents.flip
        by_sample = views == "one" and several
        self._pairs = PairIndex(source.store, source.latents, records, choice, by_sample=by_sample)
        self._features: LayerCommits | None = None
        if source.features is not None and "features" in inputs:
            over = source.snapshot.records[source.features.folder]
            self._features = open_features(source.store, source.features, over, self._pairs.commits)
            spec = source.features.features
            self._by_phrase = spec.condition == "phrase"
            names = [block_name(number) for number in self._blocks]
            scales = [f"{name}_scale" for name in names] if spec.storage == "int8" else []
            self._feature_names = [*names, *scales]
        if not len(self):
            tasks_held = ", ".join(record.task for record in held[:5]) or "no tasks"
            what = "" if choice.takes_all else f" of {choice!r}"
            raise SpecError(
                f"tasks {tasks!r}: expected at least one committed pair{what} in "
                f"{source.store.storage.url}, got none; the store holds {tasks_held} …"
            )
        self._gatherer = RowGatherer(
            self._open_array,
            pinned=device is not None and device.type == "cuda",
            num_threads=num_threads or source.store.storage.reads_at_once,
        )
        self._index: pa.Table | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process reads the same pairs by, without reading records again."""
        return self.__dict__ | {"_index": None}

    def __len__(self) -> int:
        return len(self._pairs)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The ids of the tasks that the pairs are of."""
        return self._pairs.tasks

    @property
    def task_starts(self) -> np.ndarray:
        """Numbers of the tasks' first pairs, and the pairs in all: runs of a windowed order."""
        return self._pairs.starts

    @property
    def num_samples(self) -> int:
        """Samples of an epoch: pairs, or with ``views="one"`` each task's (key, phrase)."""
        return int(self.sample_starts[-1])

    @property
    def sample_starts(self) -> np.ndarray:
        """Numbers of the tasks' first samples, and the samples in all, int64."""
        samples = self._pairs.samples
        return self._pairs.starts if samples is None else samples.starts

    def choose_pairs(self, samples: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
        """Return the pair that each sample of an epoch is, int64 (n,). Reads nothing.

        With ``views="one"`` it is one of the stored views of a (key, phrase), a pure function of
        (seed, epoch, key, phrase). Where a layer stores one view of each image, a sample is a pair
        either way.

        Raises:
            IndexError: no such sample.
        """
        numbers = np.array(samples, np.int64)
        if self._pairs.samples is not None:
            return self._pairs.samples.choose_pairs(numbers, seed=seed, epoch=epoch)
        check_numbers(numbers, len(self), "sample")
        return numbers

    @property
    def num_draws(self) -> int:
        """Draws stored a pair; 1 where no features are read, whatever the store holds."""
        if self._features is None:
            return 1
        assert self._source.features is not None
        return self._source.features.features.num_draws

    @property
    def index(self) -> pa.Table:
        """The index of every pair, read when first asked for and kept: a few 100 bytes a pair."""
        if self._index is None:
            self._index = self._pairs.read_table()
        return self._index

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

    def read(
        self, numbers: Sequence[int] | np.ndarray, *, draws: Sequence[int], texts: bool = True
    ) -> PairBatch:
        """Read pairs by number, each with one of its draws.

        Keys and phrases are read when the batch is asked for them; without ``texts`` it has none.

        Raises:
            IndexError: no such pair or draw.
            DamagedStoreError: a chunk is missing or damaged; names file and row.
        """
        gather = Gather(self._gatherer, len(numbers))
        groups = self._group(numbers)
        for task, places, rows in groups:
            gather.add(task, "mask", rows, places)
            for name in self._view_names:
                gather.add(task, name, self._pairs.read_rows(task).view_rows(rows), places)
            for name in self._text_names:
                gather.add(task, name, self._pairs.read_rows(task).prompt_rows(rows), places)
            if self._features is not None:
                self._add_features(gather, task, rows, places, draws)
        tensors = gather.read()
        inputs, mask = self._collect_inputs(tensors), tensors["mask"]
        if not texts:
            return PairBatch(inputs, mask, keys=(), phrases=())
        return LazyPairBatch(inputs, mask, partial(self._pairs.read_texts, groups, len(numbers)))

    def read_masks(self, numbers: Sequence[int] | np.ndarray) -> Tensor:
        """Read the masks of some pairs alone: (n, H, W) uint8 of 0 and 1."""
        gather = Gather(self._gatherer, len(numbers))
        for task, places, rows in self._group(numbers):
            gather.add(task, "mask", rows, places)
        return gather.read()["mask"]

    def read_features(
        self, numbers: Sequence[int] | np.ndarray, *, draws: Sequence[int]
    ) -> dict[int, Tensor | QuantizedFeature]:
        """Read the features of some pairs alone, as in a batch: block number → (n, C, h, w)."""
        gather = Gather(self._gatherer, len(numbers))
        for task, places, rows in self._group(numbers):
            self._add_features(gather, task, rows, places, draws)
        return collect_features(self._blocks, gather.read())

    def _group(self, numbers: Sequence[int] | np.ndarray) -> list[tuple[int, list[int], list[int]]]:
        """Return (task, places in the batch, rows in the task's index) of every task in a batch."""
        tasks, rows = self._pairs.locate(np.asarray(numbers, np.int64))
        groups: dict[int, tuple[list[int], list[int]]] = {}
        for place, (task, row) in enumerate(zip(tasks.tolist(), rows.tolist(), strict=True)):
            places, of_task = groups.setdefault(task, ([], []))
            places.append(place)
            of_task.append(row)
        return [(task, *group) for task, group in groups.items()]

    def _add_features(
        self, gather: Gather, task: int, rows: list[int], places: list[int], draws: Sequence[int]
    ) -> None:
        if not self._by_phrase:
            rows = self._pairs.read_rows(task).view_rows(rows)
        splits = [draws[place] for place in places]
        for name in self._feature_names:
            gather.add(task, name, rows, places, splits)

    def _open_array(self, task: int, name: str) -> ShardedArray:
        if name.startswith("block"):
            assert self._features is not None
            layer, commit = self._features.layer, self._features.read(task)
        else:
            layer, commit = self._source.latents, self._pairs.commits.read(task)
            if name == "mask" and commit.rows["masks"] != commit.rows["pairs"]:
                raise SpecError(
                    f"{commit.name}: expected a mask a pair, got {commit.rows['masks']} masks for "
                    f"{commit.rows['pairs']} pairs, which only a newer ldznet reads"
                )
        return self._source.store.open_array(layer, commit, name)

    def _collect_inputs(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        inputs: dict[str, Any] = {name: widen(tensors[name]) for name in self._text_names}
        if "latent" in self._inputs:
            latent = widen(tensors["latent_mean"])
            latent.numpy()[...] *= np.float32(self._source.latents.scaling_factor)
            inputs["latent"] = latent
        if "image" in self._inputs:
            inputs["image"] = tensors["image"]
        if self._features is not None:
            inputs["features"] = collect_features(self._blocks, tensors)
        return inputs
