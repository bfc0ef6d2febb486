"""Encoding one tar into a latents layer.

Data flow, a thread each: tar fetched, framing checked, members grouped -> samples decoded to views
and pairs, gathered into batches; prompts that are new to the task into others -> VAE and text
encoder -> arrays -> index, rejects, commit. Memory holds the batches on their way, bounded by
bytes, and the index.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from torch import Tensor

from models.ldm.encoders import LatentEncoder
from pipeline.corpus.members import Reject, SampleMembers, group_members
from pipeline.corpus.parts import pin_source, select_part
from pipeline.corpus.source import SourceChangedError, open_source
from pipeline.corpus.tar import list_members
from pipeline.corpus.tasks import Task
from pipeline.decode.pairs import View, index_rows, rejects_table
from pipeline.decode.pool import SampleDecoder
from pipeline.spec.layer import LayerSpec
from pipeline.stage.device import BatchLimit, Device, Pass, Pending
from pipeline.stage.prompt_cache import Embedding, PromptCache
from pipeline.stage.stored_form import Stored, store_float16
from pipeline.storage.interface import Storage
from pipeline.store.attempt import Attempt, PartDone, describe_provenance
from pipeline.store.commit import Accounting, SourceTar
from pipeline.store.layout import (
    EMPTY_PROMPT,
    INDEX,
    INDEX_SCHEMA,
    REJECTS,
    digest_pairs,
    latents_row_shapes,
)


@dataclass(frozen=True, slots=True, eq=False)
class ViewBatch:
    """``images``: (B, size, size, 3) uint8, pinned for a GPU. ``masks``: of each view, its pairs'.

    A view's masks are (pairs, size, size) uint8 of 0 and 1.
    """

    images: Tensor
    masks: tuple[np.ndarray, ...]
    stage: str = "vae"

    @property
    def num_bytes(self) -> int:
        """Bytes of images and masks."""
        return self.images.nbytes + sum(masks.nbytes for masks in self.masks)


@dataclass(frozen=True, slots=True, eq=False)
class PromptBatch:
    """Prompts in the order of their rows; one that is known comes with its embedding."""

    prompts: tuple[str, ...]
    known: dict[str, Embedding]
    stage: str = "text"

    @property
    def num_bytes(self) -> int:
        """Bytes of the known embeddings; the cache holds them too."""
        return sum(embedding.num_bytes for embedding in self.known.values())

    @property
    def unknown(self) -> list[str]:
        """The prompts to encode."""
        return [prompt for prompt in self.prompts if prompt not in self.known]


class LatentsStage:
    """What the latents parts of all tasks share: encoders, decoder, prompts already encoded."""

    def __init__(
        self,
        storage: Storage,
        layer: LayerSpec,
        encoder: LatentEncoder,
        *,
        device: Device,
        batch: int,
        num_decoders: int,
        decode_bytes: int,
        run: str,
        on_progress: Callable[[str], None],
    ) -> None:
        assert encoder.pooled_width == layer.pooled_width, "the encoder is of the layer's files"
        self.storage = storage
        self.layer = layer
        self.encoder = encoder
        self.batch = batch
        self.decode_bytes = decode_bytes
        self.run = run
        self.on_progress = on_progress  # hears of progress within a step, by the stage's name
        self.device = device
        self.decoder = SampleDecoder(num_workers=num_decoders)  # ends with this process
        self.prompts = PromptCache()
        self.view_limit = BatchLimit(batch, what="VAE")
        self.prompt_limit = BatchLimit(batch, what="text encoder")
        self.row_shapes = latents_row_shapes(
            layer.latents,
            num_channels=int(encoder.vae.config.latent_channels),
            text_shape=encoder.text_shape,
            pooled_width=encoder.pooled_width,
        )

    def open_part(self, task: Task, *, generation: int, sha256: str | None = None) -> "LatentsPart":
        """Return a task's part; ``sha256`` is what its tar must have to replace a commit."""
        return LatentsPart(self, task, generation=generation, sha256=sha256)


class LatentsPart:
    """One task on its way into a latents layer: a ``Part``.

    Raises, beside OSError of source and store:
        DamagedTarError: by ``fetch`` or ``read``: the tar's framing is broken.
        SourceChangedError: by ``fetch`` or ``read``: the tar is not what was listed.
        FloatingPointError: the model gave NaN or infinity.
    """

    read_stage = "decode"

    def __init__(
        self, stage: LatentsStage, task: Task, *, generation: int, sha256: str | None
    ) -> None:
        self._stage = stage
        self._task = task
        self._sha256 = sha256
        self._source: tuple[BinaryIO, SourceTar] | None = None
        self._opened = ExitStack()  # the source, while it is open
        self._groups: list[SampleMembers] = []
        self._rejects: list[Reject] = []
        self._accounting: Accounting | None = None
        self._index: list[dict[str, Any]] = []
        self._text_rows: dict[str, int] = {}
        self._num_views = 0
        self._attempt = Attempt(stage.storage, stage.layer, task.id, generation=generation)
        self._arrays: dict[str, Any] = {}

    def fetch(self) -> None:
        """Open the tar, a remote one through a local copy, and check all of its framing."""
        file, source = self._opened.enter_context(
            open_source(self._task, on_bytes=lambda num_bytes: self._stage.on_progress("fetch"))
        )
        self._source = file, source
        if self._sha256 not in (None, source.sha256):
            raise SourceChangedError(
                f"{self._task.url}: expected the tar that the store has it from, "
                f"SHA-256 {self._sha256}, got {source.sha256}; bring that tar back, or encode "
                "into another store"
            )
        groups, rejects = group_members(list_members(file, num_bytes=self._task.num_bytes))
        if self._task.num_parts > 1:
            stage = self._stage
            pin_source(stage.storage, stage.layer.folder, self._task, source.sha256)
        self._groups, self._rejects = select_part(
            groups, rejects, part=self._task.part, num_parts=self._task.num_parts
        )

    def read(self) -> Generator[ViewBatch | PromptBatch, None, None]:
        """Yield batches of views and of new prompts; the empty prompt is row 0."""
        batch, num_samples = self._stage.batch, self._count_samples()
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
        for start in range(0, len(prompts), batch):
            yield self._batch_prompts(prompts[start : start + batch])
        self._opened.close()  # tells whether the tar changed while it was read
        self._accounting = Accounting(
            samples=num_samples,
            stored_samples=num_stored,
            rejected_samples=sum(reject.level == "sample" for reject in self._rejects),
            rejected_members=sum(reject.level == "member" for reject in self._rejects),
        )

    def _count_samples(self) -> int:
        return len(self._groups) + sum(reject.level == "sample" for reject in self._rejects)

    def _decode(self) -> Iterator[tuple[View, ...]]:
        """The views of each sample that has any."""
        assert self._source is not None, "it was fetched"
        stage = self._stage
        with closing(
            stage.decoder.decode_views(
                self._source[0], self._groups, stage.layer.latents, max_bytes=stage.decode_bytes
            )
        ) as samples:
            for sample in samples:
                stage.on_progress("decode")  # a batch may be long in coming
                self._rejects += sample.rejects
                if sample.views:
                    yield sample.views

    def _batch_views(self, views: Sequence[View], prompts: list[str]) -> ViewBatch:
        """Batch views, write down their pairs, and add to ``prompts`` what is new of theirs."""
        for view in views:
            for pair in view.pairs:
                if pair.prompt not in self._text_rows:
                    self._text_rows[pair.prompt] = len(self._text_rows)
                    prompts.append(pair.prompt)
            self._index += index_rows(view, latent_row=self._num_views, text_rows=self._text_rows)
            self._num_views += 1
        return ViewBatch(
            self._stage.device.pin(np.stack([view.image for view in views])),
            tuple(np.stack([pair.mask for pair in view.pairs]) for view in views),
        )

    def _batch_prompts(self, prompts: Sequence[str]) -> PromptBatch:
        return PromptBatch(tuple(prompts), self._stage.prompts.find(prompts))

    def compute(self, batch: ViewBatch | PromptBatch) -> Iterator[Pending]:
        """Run the VAE or the text encoder; nothing where every prompt is known."""
        return self.prepare_pass(batch).run(self._stage.device)

    def prepare_pass(self, batch: ViewBatch | PromptBatch) -> Pass:
        """Bring a batch to the device and return what there is to compute of it."""
        stage = self._stage
        if isinstance(batch, PromptBatch):
            unknown = batch.unknown
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

        A row is kept for other tasks, and must be what a task of its own would have got: libraries
        choose a matrix product's kernel by its shape.
        """
        num_rows = self._stage.prompt_limit.num_rows
        padded = [*prompts, *[EMPTY_PROMPT] * (num_rows - len(prompts))]
        tokens, pooled = self._stage.encoder.encode_text(padded)
        stored = store_float16("text", tokens[: len(prompts)])
        if pooled is not None:
            stored |= store_float16("text_pooled", pooled[: len(prompts)])
        return stored

    def write(
        self, batch: ViewBatch | PromptBatch, results: Sequence[dict[str, np.ndarray]]
    ) -> None:
        """Append a batch's rows to the arrays."""
        arrays = self._open_arrays()
        if isinstance(batch, PromptBatch):
            for name, rows in self._stage.prompts.fill(batch.prompts, batch.known, results).items():
                arrays[name].append_rows(rows)
            return
        for result in results:
            for name, rows in result.items():
                arrays[name].append_rows(rows)
        if "image" in arrays:
            arrays["image"].append_rows(batch.images.numpy())
        for masks in batch.masks:
            arrays["mask"].append_rows(masks)

    def _open_arrays(self) -> dict[str, Any]:
        if not self._arrays:
            self._arrays = self._attempt.open_arrays(self._stage.row_shapes)
        return self._arrays

    def commit(self) -> PartDone:
        """Write index and rejects, and publish the attempt."""
        stage = self._stage
        assert self._source is not None, "it was read"
        self._open_arrays()  # of a tar without a sample, too
        index = pa.Table.from_pylist(self._index, schema=INDEX_SCHEMA)
        self._attempt.write_table(INDEX, index)
        self._attempt.write_table(REJECTS, rejects_table(self._rejects))
        commit, outcome = self._attempt.commit(
            rows={
                "pairs": len(self._index),
                "views": self._num_views,
                "prompts": len(self._text_rows),
            },
            pairs_sha256=digest_pairs(index),
            source=self._source[1],
            accounting=self._accounting,
            provenance=describe_provenance(
                stage.encoder, batch=stage.view_limit.num_rows, run=stage.run
            ),
        )
        reasons = tuple(str(reject.reason) for reject in self._rejects)
        return PartDone(commit, outcome == "won", reasons)

    def abandon(self) -> None:
        """Close the source, and remove what was written unless it came as far as its record."""
        with self._opened:
            self._attempt.abandon()
