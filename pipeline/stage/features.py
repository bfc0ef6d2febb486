"""Encodes one committed task of a latents layer into a features layer.

Each step has a thread: the commit's index is read; latents and text embeddings are read from the
store, some MiB ahead, and with noise and timesteps drawn by (seed, key, view, draw) become (pair x
draw) batches; the UNet runs; features are converted, written and committed. No image or VAE takes
part, and a text encoder only where the latents layer has ``text: none`` and the features are
conditioned on phrases: a second features layer costs its own UNet passes alone, and a feature
depends on the stored latent, not on which run wrote it.
"""

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from models.ldm.text_encoder import TextEncoder
from models.ldm.unet_config import LATENT_DOWNSCALE
from pipeline.spec.open_model import open_feature_encoder, open_text_encoder
from pipeline.stage.device import BatchLimit, Device, Pass, Pending
from pipeline.stage.draws import (
    Draw,
    DrawInputs,
    ReadRows,
    gather_inputs,
    list_rows,
    number_distinct,
)
from pipeline.stage.rows_ahead import AHEAD_BYTES, RowsAhead
from pipeline.stage.stored_form import Stored, store_blocks
from pipeline.stage.work import EncodeConfig
from pipeline.store.array_reader import ShardedArray
from pipeline.store.attempt import Attempt, describe_provenance
from pipeline.store.commit import Commit
from pipeline.store.layout import features_row_shapes
from pipeline.store.store import Store

NUM_WRITERS = 4  # arrays written at once: SHA-256 of one stream is 1.7 GB/s on a core


@dataclass(frozen=True, slots=True, eq=False)
class DrawBatch:
    """Input of a UNet pass, pinned for a GPU."""

    inputs: DrawInputs
    num_bytes: int
    stage: str = "unet"


class FeaturesStage:
    """What the encodings of all tasks into a features layer share. Opens the UNet."""

    def __init__(self, config: EncodeConfig, store: Store, device: Device) -> None:
        assert config.features is not None, "made only where the run has a features layer"
        self.config, self.store, self.device = config, store, device
        self.layer = config.features
        self.encoder = open_feature_encoder(
            self.layer, device=device.torch_device, tuning=config.tuning
        )
        self.text_encoder: TextEncoder | None = None  # where prompts' embeddings are not stored
        if config.latents.latents.text == "none" and self.layer.features.condition == "phrase":
            self.text_encoder = open_text_encoder(config.latents, device=device.torch_device)
        self.limit = BatchLimit(config.batch, what="UNet")
        self.writers = ThreadPoolExecutor(NUM_WRITERS, "features-write")
        side = config.latents.latents.size // LATENT_DOWNSCALE
        self.row_shapes = features_row_shapes(
            self.layer.features, self.encoder.list_shapes((side, side))
        )


class FeaturesEncoding:
    """The encoding of one task into a features layer: a ``lanes.TaskEncoding``.

    Raises, beside OSError of the store:
        DamagedStoreError: by ``fetch`` or ``read``: the latents are missing or altered.
        FloatingPointError: the UNet gave NaN or infinity.
    """

    read_stage = "read"

    def __init__(self, stage: FeaturesStage, latents: Commit, *, generation: int) -> None:
        self._stage = stage
        self._latents = latents
        self._rows: list[list[Draw]] = []
        self._mean: ShardedArray | None = None
        self._text: dict[str, ShardedArray] = {}
        self._prompts: list[str] = []  # distinct, where their embeddings are not stored
        self._attempt = Attempt(
            stage.store.storage, stage.layer, latents.task, generation=generation
        )
        self._arrays: dict[str, Any] = {}

    def fetch(self) -> None:
        """Read the index and open the arrays."""
        store, layer = self._stage.store, self._stage.config.latents
        index = store.read_index(self._latents).to_pydict()
        self._mean = store.open_array(layer, self._latents, "latent_mean")
        if self._stage.text_encoder is None:
            self._text = {
                name: store.open_array(layer, self._latents, name) for name in layer.text_arrays
            }
        else:
            self._prompts, numbers = number_distinct(index["prompt"])
            index["text_row"] = numbers.tolist()
        self._rows = list_rows(index, self._stage.layer.features)

    def read(self) -> Generator[DrawBatch, None, None]:
        """Yield batches of draws with what they read, each distinct row once a batch."""
        assert self._mean is not None, "it was fetched"
        draws = (draw for row in self._rows for draw in row)
        # Latents come in the order of their rows; a prompt may return at the task's end.
        read_latents = RowsAhead(
            self._mean, (row[0].latent_row for row in self._rows), kept_bytes=2 * AHEAD_BYTES
        )
        read_text: dict[str, ReadRows] = {
            name: RowsAhead(array, (row[0].text_row for row in self._rows))
            for name, array in self._text.items()
        }
        if self._stage.text_encoder is not None:
            read_text = {"text": np.array}  # the prompts' numbers, for ``build_pass``
        while batch := tuple(islice(draws, self._stage.config.batch)):
            inputs = gather_inputs(
                batch,
                read_latents=read_latents,
                read_text=read_text,
                seed=self._stage.layer.features.seed,
                pin=self._stage.device.pin,
            )
            num_bytes = sum(tensor.nbytes for tensor in inputs.tensors.values())
            yield DrawBatch(inputs, num_bytes)

    def compute(self, batch: DrawBatch) -> Iterator[Pending]:
        """Run the UNet up to the last block asked for."""
        return self.build_pass(batch).run(self._stage.device)

    def build_pass(self, batch: DrawBatch) -> Pass:
        """Upload a batch and return what there is to compute of it."""
        stage = self._stage
        tensors = batch.inputs.tensors
        inputs = DrawInputs(**{name: stage.device.upload(x) for name, x in tensors.items()})
        if stage.text_encoder is not None:
            prompts = [self._prompts[number] for number in tensors["text"].tolist()]
            with torch.inference_mode():
                text, pooled = stage.text_encoder(prompts)
            half = None if pooled is None else pooled.half()  # as they would be stored
            inputs = replace(inputs, text=text.half(), pooled=half)
        factor = stage.config.latents.scaling_factor

        def compute(rows: slice) -> Stored:
            found = inputs.encode(stage.encoder, scaling_factor=factor, rows=rows)
            return store_blocks(found, stage.layer.features)

        return Pass(stage.limit, len(inputs.timestep), compute)

    def write(self, batch: DrawBatch, results: Sequence[dict[str, np.ndarray]]) -> None:
        """Append a batch's features, the arrays side by side."""
        arrays = self._open_arrays()
        for result in results:
            writing = [
                self._stage.writers.submit(arrays[name].append_chunks, values)
                for name, values in result.items()
            ]
            wait(writing)  # all, or one would still write after another's error
            for future in writing:
                future.result()

    def _open_arrays(self) -> dict[str, Any]:
        if not self._arrays:
            self._arrays = self._attempt.open_arrays(self._stage.row_shapes)
            timesteps = [[draw.timestep for draw in row] for row in self._rows]
            shape = (-1, self._stage.layer.features.num_draws)
            rows = np.array(timesteps, dtype=np.int16).reshape(shape)
            self._arrays["timestep"].append_rows(rows)
        return self._arrays

    def commit(self) -> tuple[Commit, str]:
        """Publish the attempt; the result is ``Attempt.commit``'s."""
        stage = self._stage
        self._open_arrays()  # of a task without a pair, too
        return self._attempt.commit(
            rows=self._latents.rows,
            pairs_sha256=self._latents.pairs_sha256,
            latents_generation=self._latents.generation,
            source_sha256=self._latents.source.sha256 if self._latents.source else None,
            provenance=describe_provenance(
                stage.encoder, batch=stage.limit.num_rows, run=stage.config.run
            ),
        )

    def abandon(self) -> None:
        """Remove what was written unless the commit has begun."""
        self._attempt.abandon()
