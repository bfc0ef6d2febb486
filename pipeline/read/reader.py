"""Reading committed pairs as batches of tensors.

Data flow: a snapshot's commits -> a pair number's task and row -> the rows of the arrays that a
head reads -> gathered into one tensor an array -> a batch.
"""

import fnmatch
import logging
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
from pipeline.read.commits import LayerCommits, open_features, telling_of_repair
from pipeline.read.gather import Gather, RowGatherer
from pipeline.read.pair_index import NO_ROW, PairIndex, take_rows
from pipeline.read.prompt_embedder import PromptEmbedder
from pipeline.read.source import Source
from pipeline.read.view_samples import check_numbers
from pipeline.store.array_reader import ShardedArray
from pipeline.store.layout import EMPTY_PROMPT, block_name, index_schema
from pipeline.store.task_ids import NUM_NAMED, describe_unmatched, name_some

logger = logging.getLogger(__name__)

_EVERY_PAIR = PairChoice()


class PairReader:
    """The chosen pairs of the tasks that match a glob, by number from 0, in task and row order.

    Threads may share a reader; another process gets its own, by pickling or by a fork.

    Args:
        source: the layers and the snapshot.
        tasks: one or more globs over task ids.
        option: which option or field names the tasks, for errors.
        inputs: what of a pair is read: latent, text, image, features.
        blocks: whose features are read.
        choice: which pairs of the tasks.
        device: where batches go: for CUDA their memory is pinned.
        num_threads: reads at once; by default as many as the storage wants.
        views: ``every``: each stored view of a pair is a sample of an epoch. ``one``: each (key,
            phrase) yields one stored view an epoch (a crop, perhaps mirrored), see
            ``choose_pairs``.
        masks: read masks and ignore regions, and leave out the pairs that have no mask. Without,
            every pair is there, and a batch's ``mask`` and ``ignore`` are None.
        negatives: with masks, read negative pairs too, with empty masks.
        model: the LDM's folder, where it is not where a ``text: none`` layer says. With its text
            encoder, on ``device``, the prompts of such a layer are embedded as they are read.

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
        masks: bool = True,
        negatives: bool = True,
        model: str | None = None,
        option: str = "tasks",
    ) -> None:
        self._source = source
        self._inputs = inputs
        self._blocks = tuple(blocks)
        self._check_inputs()
        self._text_names = source.latents.text_arrays if "text" in inputs else ()
        self._embedder: PromptEmbedder | None = None
        if source.latents.latents.text == "none":
            self._embedder = PromptEmbedder(source.latents, device=device, model=model)
        views_of = {"latent": "latent_mean", "image": "image"}
        self._view_names = [name for read, name in views_of.items() if read in inputs]
        globs = (tasks,) if isinstance(tasks, str) else tuple(tasks)
        matches = re.compile("|".join(map(fnmatch.translate, globs)) or "(?!)").match
        held = source.snapshot.records[source.latents.folder]
        records = [record for record in held if matches(record.task)]
        if not records:
            ids = [record.task for record in held]
            raise SpecError(describe_unmatched(option, globs, source.store.storage.url, ids))
        latents = source.latents.latents
        several = latents.views > 1 or latents.flip
        choice.check_columns(index_schema(source.latents), where=source.latents.folder)
        with telling_of_repair(source.store, source.folders):
            self._pairs = PairIndex(
                *(source.store, source.latents, records, choice),
                by_sample=views == "one" and several,
                masks=masks,
                negatives=negatives,
            )
        self._masks = masks
        self._ignores = masks and bool(self._pairs.commits.num_ignores.any())
        self._features: LayerCommits | None = None
        if source.features is not None and "features" in inputs:
            over = source.snapshot.records[source.features.folder]
            with telling_of_repair(source.store, source.folders):
                self._features = open_features(
                    source.store, source.features, over, self._pairs.commits
                )
            spec = source.features.features
            self._by_phrase = spec.condition == "phrase"
            names = [block_name(number) for number in self._blocks]
            scales = [f"{name}_scale" for name in names] if spec.storage == "int8" else []
            self._feature_names = [*names, *scales]
        if not len(self):
            what = " with a mask" if self.maskless else ""
            what += "" if choice.takes_all else f" that meets {choice.describe()}"
            some = ", ".join(record.task for record in records[:NUM_NAMED])
            raise SpecError(
                f"{option}: expected at least one committed pair{what} in the tasks of "
                f"{source.store.storage.url} that match {tasks!r}, got none in {len(records)}, "
                f"such as {some}"
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
    def maskless(self) -> tuple[str, ...]:
        """The ids of those of them that have pairs, but with ``masks`` none that is read."""
        records = self._pairs.commits.records
        return tuple(records[task].task for task in sorted(self._pairs.maskless))

    def warn_of_maskless(self, what: str) -> None:
        """Log which tasks have no mask; ``what`` says of what: ``data.train``."""
        if names := self.maskless:
            logger.warning(
                "%s: %d of %d tasks have no pair with a mask, so nothing of them is read: %s",
                *(what, len(names), len(self.tasks), name_some(names)),
            )

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

    def digest_samples(self) -> str:
        """Return 16 hex digits over which samples these are, by number; reads nothing."""
        return self._pairs.digest()

    def list_shared(self, other: "PairReader") -> list[tuple[str, str]]:
        """Return tasks of this and of another reader that are from equal tars, or parts of them."""
        theirs = {tar: task for task, tar in other._pairs.list_tars()}
        return [(task, theirs[tar]) for task, tar in self._pairs.list_tars() if tar in theirs]

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

    def read_columns(self, names: Sequence[str]) -> pa.Table:
        """Read more columns of every pair's row of ``index.parquet``, those of keep_json too."""
        return self._pairs.read_table(names).select(names)

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
        with telling_of_repair(self._source.store, self._source.folders):
            return self._read(numbers, draws, texts)

    def _read(
        self, numbers: Sequence[int] | np.ndarray, draws: Sequence[int], texts: bool
    ) -> PairBatch:
        gather = Gather(self._gatherer, len(numbers))
        groups = self._group(numbers)
        if self._masks:
            self._add_masks(gather, groups)
        unread: dict[int, str] = {}  # place -> prompt that the store does not hold embedded
        for task, places, rows in groups:
            for name in self._view_names:
                gather.add(task, name, self._view_rows(task, rows), places)
            if self._text_names:
                unread |= self._add_texts(gather, task, rows, places)
            if self._features is not None:
                self._add_features(gather, task, rows, places, draws)
        tensors = gather.read()
        if unread:
            self._embed(unread, tensors)
        inputs = self._collect_inputs(tensors)
        mask, ignore = tensors.get("mask"), tensors.get("ignore")
        if not texts:
            return PairBatch(inputs, mask, keys=(), phrases=(), ignore=ignore)
        read_texts = partial(self._pairs.read_texts, groups, len(numbers))
        return LazyPairBatch(inputs, mask, read_texts, ignore)

    def read_masks(self, numbers: Sequence[int] | np.ndarray) -> tuple[Tensor, Tensor | None]:
        """Read ``mask`` and ``ignore`` of some pairs alone, as in a batch."""
        gather = Gather(self._gatherer, len(numbers))
        with telling_of_repair(self._source.store, self._source.folders):
            self._add_masks(gather, self._group(numbers))
            tensors = gather.read()
        return tensors["mask"], tensors.get("ignore")

    def read_features(
        self, numbers: Sequence[int] | np.ndarray, *, draws: Sequence[int]
    ) -> dict[int, Tensor | QuantizedFeature]:
        """Read the features of some pairs alone, as in a batch: block number → (n, C, h, w)."""
        gather = Gather(self._gatherer, len(numbers))
        with telling_of_repair(self._source.store, self._source.folders):
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

    def _view_rows(self, task: int, rows: list[int]) -> list[int]:
        return take_rows(self._pairs.read_rows(task).views, rows)

    def _add_masks(
        self, gather: Gather, groups: Sequence[tuple[int, list[int], list[int]]]
    ) -> None:
        """Add the masks, zeros of a negative, and the ignore regions, zeros where there is none."""
        commits = self._pairs.commits
        for task, places, rows in groups:
            if commits.num_masks[task] != commits.num_pairs[task]:
                rows = take_rows(self._pairs.read_rows(task).masks, rows)
            _add_some(gather, task, "mask", rows, places)
        for task, places, rows in groups if self._ignores else ():
            if commits.num_ignores[task]:
                rows = take_rows(self._pairs.read_rows(task).ignores, rows)
                _add_some(gather, task, "ignore", rows, places)
            else:
                gather.add_zeros("ignore", places, like="mask")

    def _add_texts(
        self, gather: Gather, task: int, rows: list[int], places: list[int]
    ) -> dict[int, str]:
        """Add what is stored of the prompts' embeddings; return the other prompts by place."""
        unread: dict[int, str] = {}
        if self._embedder is None:
            stored = take_rows(self._pairs.read_rows(task).prompts, rows)
        else:
            prompts = zip(places, self._pairs.read_prompts(task, rows), strict=True)
            unread = {place: prompt for place, prompt in prompts if prompt != EMPTY_PROMPT}
            stored = [NO_ROW if place in unread else 0 for place in places]
        for name in self._text_names:
            _add_some(gather, task, name, stored, places)
        return unread

    def _embed(self, prompts: dict[int, str], tensors: dict[str, Tensor]) -> None:
        assert self._embedder is not None
        for name, rows in self._embedder.embed(list(prompts.values())).items():
            tensors[name].numpy()[list(prompts)] = rows

    def _add_features(
        self, gather: Gather, task: int, rows: list[int], places: list[int], draws: Sequence[int]
    ) -> None:
        if not self._by_phrase:
            rows = self._view_rows(task, rows)
        splits = [draws[place] for place in places]
        for name in self._feature_names:
            gather.add(task, name, rows, places, splits)

    def _open_array(self, task: int, name: str) -> ShardedArray:
        if name.startswith("block"):
            assert self._features is not None
            layer, commit = self._features.layer, self._features.read(task)
        else:
            layer, commit = self._source.latents, self._pairs.commits.read(task)
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


def _add_some(
    gather: Gather, task: int, name: str, rows: Sequence[int], places: Sequence[int]
) -> None:
    """Add the rows that there are; the places of ``NO_ROW`` get zeros."""
    if min(rows) == NO_ROW:
        there = [(row, place) for row, place in zip(rows, places, strict=True) if row != NO_ROW]
        lacking = [place for row, place in zip(rows, places, strict=True) if row == NO_ROW]
        gather.add(task, name, [row for row, _ in there], [place for _, place in there])
        gather.add_zeros(name, lacking, like=name)
    else:
        gather.add(task, name, rows, places)
