"""Encodes one tar, or one part of a tar, into a latents layer.

Each step has a thread: the tar is fetched, its framing checked and its members grouped; samples are
decoded to views and pairs and gathered into batches, with batches of the task's new prompts between
them; VAE and text encoder run; arrays are written; index and rejects are written and committed.
Memory holds the batches in the queues, bounded by bytes, and the index.
"""

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from torch import Tensor

from pipeline.corpus.members import Reject, SampleMembers, group_members
from pipeline.corpus.parts import pin_source, select_part
from pipeline.corpus.source import SourceChangedError, open_source
from pipeline.corpus.tar import list_members
from pipeline.corpus.text import SampleText
from pipeline.decode.negatives import NegativePool
from pipeline.decode.pairs import (
    Pair,
    View,
    count_notes,
    index_rows,
    negative_row,
    rejects_table,
)
from pipeline.decode.pool import SampleDecoder
from pipeline.spec.open_model import open_latent_encoder
from pipeline.stage.device import BatchLimit, Device, Pass, Pending
from pipeline.stage.stored_form import Stored, store_float16, store_text
from pipeline.stage.work import EncodeConfig, WorkItem
from pipeline.storage.interface import Storage
from pipeline.store.attempt import Attempt, describe_provenance
from pipeline.store.commit import Accounting, Commit, SourceTar
from pipeline.store.layout import (
    EMPTY_PROMPT,
    INDEX,
    REJECTS,
    digest_pairs,
    index_schema,
    latents_row_shapes,
)
from pipeline.store.prompt_cache import Embedding, PromptCache, count_bytes


@dataclass(frozen=True, slots=True, eq=False)
class ViewBatch:
    """Input of a VAE pass, with the masks that are written beside its results.

    ``images`` is (B, size, size, 3) uint8, pinned for a GPU; ``masks`` and ``ignores`` are those of
    all views, in order, each (size, size) uint8 of 0 and 1.
    """

    images: Tensor
    masks: tuple[np.ndarray, ...]
    ignores: tuple[np.ndarray, ...]
    num_bytes: int
    stage: str = "vae"


@dataclass(frozen=True, slots=True, eq=False)
class PromptBatch:
    """Input of a text encoder pass: prompts in the order of their rows; some may be known."""

    prompts: tuple[str, ...]
    known: dict[str, Embedding]
    num_bytes: int  # of the known embeddings, which the cache holds too
    stage: str = "text"


class LatentsStage:
    """What the encodings of all tasks into a latents layer share: encoder, decoder, prompt cache.

    Opens VAE and text encoder. ``on_progress`` is called within long steps, with the name of the
    step's stage.
    """

    def __init__(
        self,
        config: EncodeConfig,
        storage: Storage,
        device: Device,
        on_progress: Callable[[str], None],
    ) -> None:
        layer = config.latents
        self.config, self.storage, self.device = config, storage, device
        self.on_progress = on_progress
        self.encoder = open_latent_encoder(layer, device=device.torch_device, tuning=config.tuning)
        self.decoder = SampleDecoder(num_workers=config.num_decoders)  # ends with this process
        self.prompts = PromptCache()
        self.view_limit = BatchLimit(config.batch, what="VAE")
        self.prompt_limit = BatchLimit(config.batch, what="text encoder")
        self.row_shapes = latents_row_shapes(
            layer.latents,
            num_channels=int(self.encoder.vae.config.latent_channels),
            text_shape=self.encoder.text_shape,
            pooled_width=self.encoder.pooled_width,
        )


class LatentsEncoding:
    """The encoding of one task into a latents layer: a ``lanes.TaskEncoding``.

    ``previous`` is the generation before. The tar must have its SHA-256, unless the item renews it:
    features of that generation may stand, and belong to its views. Raises, beside OSError of source
    and store:
        DamagedTarError: by ``fetch`` or ``read``: the tar's framing is broken.
        SourceChangedError: by ``fetch`` or ``read``: the tar is not what was listed.
        FloatingPointError: the model gave NaN or infinity.
    """

    read_stage = "decode"

    def __init__(self, stage: LatentsStage, item: WorkItem, previous: Commit | None) -> None:
        self._stage = stage
        self._task = task = item.task
        self._renews, self._sha256 = item.renews, item.sha256
        self._previous = previous
        if previous is not None and previous.source is not None and not item.renews:
            self._sha256 = previous.source.sha256
        self._source: tuple[BinaryIO, SourceTar] | None = None
        self._opened = ExitStack()  # the source, while it is open
        self._groups: list[SampleMembers] = []
        self._rejects: list[Reject] = []
        self._num_set_aside = 0
        self._texts: dict[str, SampleText] = {}  # by key, of samples with views, to draw from
        self._notes: Counter[str] = Counter()
        self._accounting: Accounting | None = None
        self._index: list[dict[str, Any]] = []
        self._text_rows: dict[str, int] = {}
        self._cut_prompts: set[str] = set()
        self._num_views = self._num_masks = self._num_ignores = 0
        layer = stage.config.latents
        self._spec = layer.latents
        self._attempt = Attempt(stage.storage, layer, task.id, generation=item.next_latents)
        self._arrays: dict[str, Any] = {}

    def fetch(self) -> None:
        """Open the tar, a remote one through a local copy, and check all of its framing."""
        task, stage = self._task, self._stage
        file, source = self._opened.enter_context(
            open_source(task, on_bytes=lambda num_bytes: stage.on_progress("fetch"))
        )
        self._source = file, source
        if self._sha256 not in (None, source.sha256):
            raise SourceChangedError(
                f"{task.url}: expected the tar that was encoded or listed, SHA-256 {self._sha256}, "
                f"got {source.sha256}; bring that tar back, or give --changed renew"
            )
        groups, rejects, set_aside = group_members(list_members(file, num_bytes=task.num_bytes))
        self._num_set_aside = len(set_aside) if task.part == 0 else 0
        previous = self._previous
        is_renewed = self._renews or (previous is not None and previous.content_since > 0)
        if task.num_parts > 1 and not is_renewed:  # else its SHA-256 is known, and is not the pin's
            pin_source(stage.storage, stage.config.latents.folder, task, source.sha256)
        self._groups, self._rejects = select_part(
            groups, rejects, part=task.part, num_parts=task.num_parts
        )

    def read(self) -> Generator[ViewBatch | PromptBatch, None, None]:
        """Yield batches of views and of new prompts; the empty prompt is row 0."""
        batch = self._stage.config.batch
        num_samples = len(self._groups) + sum(x.level == "sample" for x in self._rejects)
        views: list[View] = []
        prompts = [EMPTY_PROMPT]
        self._text_rows[EMPTY_PROMPT] = 0
        num_stored = 0
        for found in self._decode():
            num_stored += 1
            views += found
            while len(views) >= batch:
                yield self._batch_views(views[:batch], prompts)
                del views[:batch]
            while len(prompts) >= batch:
                yield self._batch_prompts(prompts[:batch])
                del prompts[:batch]
        if views:
            yield self._batch_views(views, prompts)
        prompts += self._add_negatives()
        for start in range(0, len(prompts), batch):
            yield self._batch_prompts(prompts[start : start + batch])
        self._opened.close()  # raises if the tar changed while it was read
        levels = Counter(reject.level for reject in self._rejects)
        self._accounting = Accounting(
            samples=num_samples,
            stored_samples=num_stored,
            rejected_samples=levels["sample"],
            rejected_members=levels["member"],
            rejected_pairs=levels["pair"],
            set_aside_members=self._num_set_aside,
            rejects=dict(sorted(Counter(str(x.reason) for x in self._rejects).items())),
            notes=count_notes(self._index, self._stage.config.latents.latents) | self._notes,
        )

    def _decode(self) -> Iterator[tuple[View, ...]]:
        """Yield the views of each sample that has any; collect the rejects of all."""
        assert self._source is not None, "it was fetched"
        config = self._stage.config
        with closing(
            self._stage.decoder.decode_views(
                self._source[0], self._groups, config.latents.latents, max_bytes=config.queue_bytes
            )
        ) as samples:
            for sample in samples:
                self._stage.on_progress("decode")  # a whole batch may take long
                self._rejects += sample.rejects
                if sample.views:
                    if self._spec.negatives:
                        self._texts[sample.views[0].source.key] = sample.text
                    self._num_set_aside += sample.text.num_set_aside
                    self._notes += sample.notes
                    yield sample.views

    def _batch_views(self, views: Sequence[View], prompts: list[str]) -> ViewBatch:
        """Batch views and index their pairs; append their new prompts to ``prompts``."""
        prompts += self._number_prompts(pair for view in views for pair in view.pairs)
        for view in views:
            self._index += index_rows(
                view,
                latent_row=self._num_views,
                text_rows=self._text_rows,
                mask_row=self._num_masks,
                ignore_row=self._num_ignores,
                cut_prompts=self._cut_prompts,
                keep_json=self._spec.keep_json,
            )
            self._num_views += 1
            self._num_masks += len(view.masks)
            self._num_ignores += view.ignore is not None
        images = self._stage.device.pin(np.stack([view.image for view in views]))
        masks = tuple(mask for view in views for mask in view.masks)
        ignores = tuple(view.ignore for view in views if view.ignore is not None)
        return ViewBatch(images, masks, ignores, sum(view.num_bytes for view in views))

    def _number_prompts(self, pairs: Iterable[Pair]) -> list[str]:
        """Give the pairs' new prompts their rows, and return those that are to be embedded."""
        new = [x for x in dict.fromkeys(pair.prompt for pair in pairs) if x not in self._text_rows]
        self._cut_prompts |= self._stage.encoder.text_encoder.find_cut(new)
        if self._spec.text == "none":
            return []
        self._text_rows |= {prompt: len(self._text_rows) + i for i, prompt in enumerate(new)}
        return new

    def _add_negatives(self) -> list[str]:
        """Index the drawn negatives of every view, and return their new prompts."""
        if not self._spec.negatives:
            return []
        pool = NegativePool(self._texts, self._spec)
        views = {row["latent_row"]: row for row in reversed(self._index)}
        drawn = [
            (row, pair)
            for row in reversed(views.values())
            for pair in pool.build_pairs(row["key"], row["view"])
        ]
        prompts = self._number_prompts(pair for _, pair in drawn)
        self._index += [
            negative_row(
                row,
                pair,
                text_rows=self._text_rows,
                cut_prompts=self._cut_prompts,
                keep_json=self._spec.keep_json,
            )
            for row, pair in drawn
        ]
        return prompts

    def _batch_prompts(self, prompts: Sequence[str]) -> PromptBatch:
        known = self._stage.prompts.get_known(prompts)
        return PromptBatch(tuple(prompts), known, sum(map(count_bytes, known.values())))

    def compute(self, batch: ViewBatch | PromptBatch) -> Iterator[Pending]:
        """Run the VAE or the text encoder; nothing where every prompt is known."""
        return self.build_pass(batch).run(self._stage.device)

    def build_pass(self, batch: ViewBatch | PromptBatch) -> Pass:
        """Upload a batch and return what there is to compute of it."""
        stage = self._stage
        if isinstance(batch, PromptBatch):
            unknown = [prompt for prompt in batch.prompts if prompt not in batch.known]
            return Pass(
                stage.prompt_limit, len(unknown), lambda rows: self._encode_prompts(unknown[rows])
            )
        images = stage.device.upload(batch.images)
        return Pass(stage.view_limit, len(images), lambda rows: self._encode_images(images[rows]))

    def _encode_images(self, images: Tensor) -> Stored:
        mean, logvar = self._stage.encoder.encode_image(images)
        return store_float16("latent_mean", mean) | store_float16("latent_logvar", logvar)

    def _encode_prompts(self, prompts: Sequence[str]) -> Stored:
        """Encode prompts in passes of one size, whatever their number.

        Libraries choose a matrix product's kernel by its shape, and a cached row must be what any
        other task would compute.
        """
        num_rows = self._stage.prompt_limit.num_rows
        padded = [*prompts, *[EMPTY_PROMPT] * (num_rows - len(prompts))]
        tokens, pooled = self._stage.encoder.encode_text(padded)
        num = len(prompts)
        return store_text(tokens[:num], None if pooled is None else pooled[:num])

    def write(
        self, batch: ViewBatch | PromptBatch, results: Sequence[dict[str, np.ndarray]]
    ) -> None:
        """Append a batch's rows to the arrays."""
        arrays = self._open_arrays()
        if isinstance(batch, PromptBatch):
            results = [self._stage.prompts.merge(batch.prompts, batch.known, results)]
        for result in results:
            for name, rows in result.items():
                arrays[name].append_rows(rows)
        if isinstance(batch, ViewBatch):
            if "image" in arrays:
                arrays["image"].append_rows(batch.images.numpy())
            if batch.ignores and "ignore" not in arrays:
                arrays = self._attempt.open_arrays(self._stage.row_shapes, {"ignores": 1})
            for name, planes in (("mask", batch.masks), ("ignore", batch.ignores)):
                for plane in planes:
                    arrays[name].append_rows(plane[None])

    def _open_arrays(self) -> dict[str, Any]:
        if not self._arrays:
            self._arrays = self._attempt.open_arrays(self._stage.row_shapes)
        return self._arrays

    def commit(self) -> tuple[Commit, str]:
        """Write index and rejects, and publish the attempt; the result is ``Attempt.commit``'s."""
        stage, previous = self._stage, self._previous
        assert self._source is not None, "it was read"
        source = self._source[1]
        since = self._attempt.generation  # the first one of the content
        if previous and previous.source and previous.source.sha256 == source.sha256:
            since = previous.content_since
        self._open_arrays()  # of a tar without a sample, too
        index = pa.Table.from_pylist(self._index, schema=index_schema(stage.config.latents))
        self._attempt.write_table(INDEX, index)
        self._attempt.write_table(REJECTS, rejects_table(self._rejects))
        return self._attempt.commit(
            rows={
                "pairs": len(self._index),
                "views": self._num_views,
                "prompts": len(self._text_rows),
                "masks": self._num_masks,
                "ignores": self._num_ignores,
            },
            pairs_sha256=digest_pairs(index),
            content_since=since,
            source=source,
            accounting=self._accounting,
            provenance=describe_provenance(
                stage.encoder, batch=stage.view_limit.num_rows, run=stage.config.run
            ),
        )

    def abandon(self) -> None:
        """Close the source, and remove what was written unless the commit has begun."""
        with self._opened:
            self._attempt.abandon()
