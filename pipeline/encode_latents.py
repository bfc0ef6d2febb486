"""Encoding one tar into a latents layer.

Data flow: tar framing -> samples -> views and pairs -> VAE in batches -> arrays and index, while
distinct prompts gather -> text encoder -> commit. Memory holds two decoded samples, the views
that wait for a full batch, and the index.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import torch

from models.ldm import LatentEncoder
from pipeline.attempt import Attempt, describe_provenance, to_float16
from pipeline.commit import Accounting, Commit
from pipeline.corpus import SourceChangedError, Task, open_source
from pipeline.layout import EMPTY_PROMPT, INDEX, REJECTS, latents_row_shapes
from pipeline.pairs import (
    INDEX_SCHEMA,
    View,
    build_views,
    digest_pairs,
    index_rows,
    rejects_table,
)
from pipeline.sample_decoder import SampleDecoder
from pipeline.samples import (
    Reject,
    RejectReason,
    SampleMembers,
    group_members,
)
from pipeline.spec import LayerSpec
from pipeline.storage_interface import Storage
from pipeline.tar import list_members


class LatentsStage:
    """Turns tars into committed tasks of one latents layer. Knows nothing of Ray."""

    def __init__(
        self, storage: Storage, layer: LayerSpec, encoder: LatentEncoder, *, batch: int
    ) -> None:
        self._storage = storage
        self._layer = layer
        self._encoder = encoder
        self._batch = batch
        self._decoder = SampleDecoder()  # its worker serves all tasks, and ends with this process
        assert encoder.pooled_width == layer.pooled_width, "the encoder is of the layer's files"
        self._row_shapes = latents_row_shapes(
            layer.latents,
            num_channels=int(encoder.vae.config.latent_channels),
            text_shape=encoder.text_shape,
            pooled_width=encoder.pooled_width,
        )

    def encode_task(
        self, task: Task, *, generation: int, sha256: str | None = None
    ) -> tuple[Commit, list[Reject], bool]:
        """Encode a tar and commit it; return the record, the rejects, and whether ours won.

        ``sha256`` is what the tar's must be, where a commit of it is replaced.

        Raises:
            DamagedTarError: the tar's framing is broken; nothing is stored of it.
            SourceChangedError: the tar is not what was listed.
            FloatingPointError: the model gave NaN or infinity.
            OSError: the source or the store failed.
        """
        with Attempt(self._storage, self._layer, task.id, generation=generation) as attempt:
            run = _TaskRun(
                self._encoder, self._decoder, self._layer, attempt.open_arrays(self._row_shapes)
            )
            with open_source(task) as (file, source):  # tells on leaving whether the tar changed
                if sha256 not in (None, source.sha256):
                    raise SourceChangedError(
                        f"{task.url}: expected the tar that the damaged commit was read from, "
                        f"SHA-256 {sha256}, got {source.sha256}; bring that tar back, or encode "
                        "into another store"
                    )
                accounting = run.encode_samples(file, task.num_bytes, batch=self._batch)
            run.encode_prompts(batch=self._batch)
            index = pa.Table.from_pylist(run.index, schema=INDEX_SCHEMA)
            attempt.write_table(INDEX, index)
            attempt.write_table(REJECTS, rejects_table(run.rejects))
            commit, outcome = attempt.commit(
                rows={
                    "pairs": len(run.index),
                    "views": run.num_views,
                    "prompts": len(run.text_rows),
                },
                pairs_sha256=digest_pairs(index),
                source=source,
                accounting=accounting,
                provenance=describe_provenance(
                    self._encoder.device, batch=self._batch, tuning=self._encoder.tuning
                ),
            )
        return commit, run.rejects, outcome == "won"


class _TaskRun:
    """What builds up while one tar is encoded."""

    def __init__(
        self,
        encoder: LatentEncoder,
        decoder: SampleDecoder,
        layer: LayerSpec,
        arrays: dict[str, Any],
    ) -> None:
        self._decoder = decoder
        self._encoder = encoder
        self._spec = layer.latents
        self._arrays = arrays
        self.index: list[dict[str, Any]] = []
        self.rejects: list[Reject] = []
        self.text_rows: dict[str, int] = {EMPTY_PROMPT: 0}
        self.num_views = 0

    def encode_samples(self, file: BinaryIO, num_bytes: int, *, batch: int) -> Accounting:
        """Encode every sample of the tar; return what became of them."""
        groups, self.rejects = group_members(list_members(file, num_bytes=num_bytes))
        num_samples = len(groups) + sum(reject.level == "sample" for reject in self.rejects)
        stored: set[str] = set()
        pending: list[View] = []
        for views in self._decode(file, groups):
            stored.add(views[0].source.key)
            pending += views
            while len(pending) >= batch:
                self._encode_views(pending[:batch])
                del pending[:batch]
        if pending:
            self._encode_views(pending)
        return Accounting(
            samples=num_samples,
            stored_samples=len(stored),
            rejected_samples=sum(reject.level == "sample" for reject in self.rejects),
            rejected_members=sum(reject.level == "member" for reject in self.rejects),
        )

    def _decode(self, file: BinaryIO, groups: Sequence[SampleMembers]) -> Iterator[list[View]]:
        with closing(self._decoder.decode_all(file, groups)) as samples:
            for members, sample in zip(groups, samples, strict=True):
                if isinstance(sample, Reject):
                    self.rejects.append(sample)
                    continue
                views, outside = build_views(sample, self._spec)
                self.rejects += outside
                if views:
                    yield views
                    continue
                self.rejects.append(
                    Reject(
                        name=sample.key,
                        level="sample",
                        reason=RejectReason.OUTSIDE_VIEW,
                        detail="no phrase's mask falls into any view",
                        num_members=members.num_members,
                    )
                )

    def _encode_views(self, batch: Sequence[View]) -> None:
        images = np.stack([view.image for view in batch])
        mean, logvar = self._encoder.encode_image(torch.from_numpy(images))
        self._arrays["latent_mean"].append_rows(to_float16("latent_mean", mean))
        self._arrays["latent_logvar"].append_rows(to_float16("latent_logvar", logvar))
        if "image" in self._arrays:
            self._arrays["image"].append_rows(images)
        for view in batch:
            for pair in view.pairs:
                self.text_rows.setdefault(pair.prompt, len(self.text_rows))
            self._arrays["mask"].append_rows(np.stack([pair.mask for pair in view.pairs]))
            self.index += index_rows(view, latent_row=self.num_views, text_rows=self.text_rows)
            self.num_views += 1

    def encode_prompts(self, *, batch: int) -> None:
        """Encode each distinct prompt of the task once, the empty prompt first."""
        prompts = list(self.text_rows)
        for start in range(0, len(prompts), batch):
            text = self._encoder.encode_text(prompts[start : start + batch])
            self._arrays["text"].append_rows(to_float16("text", text.tokens))
            if text.pooled is not None:
                pooled = to_float16("text_pooled", text.pooled)
                self._arrays["text_pooled"].append_rows(pooled)
