"""Encoding one committed task of a latents layer into a features layer.

Data flow, a thread each: the commit's index -> latents and text embeddings from the store, noise
and timestep by (seed, key, view, draw), in (pair x draw) batches -> UNet -> storage form -> arrays
-> commit. No image, no VAE and no text encoder takes part, so a second features layer costs only
its own UNet passes, and a feature depends on the stored latent, not on which run wrote it.
"""

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.ldm.encoders import FeatureEncoder
from pipeline.spec.fields import LATENT_DOWNSCALE, UniformTimesteps
from pipeline.spec.layer import LayerSpec
from pipeline.stage.device import BatchLimit, Device, Pass, Pending
from pipeline.stage.draws import Draw, DrawInputs, draw_view_noise, list_rows, number_distinct
from pipeline.stage.stored_form import Stored, store_blocks
from pipeline.store.array_reader import ShardedArray
from pipeline.store.attempt import Attempt, PartDone, describe_provenance
from pipeline.store.commit import Commit
from pipeline.store.layout import features_row_shapes
from pipeline.store.store import Store

NUM_HASHERS = 4  # arrays written at once: SHA-256 of one stream is 1.7 GB/s on a core


@dataclass(frozen=True, slots=True, eq=False)
class DrawBatch:
    """The inputs of a UNet pass, pinned for a GPU."""

    inputs: DrawInputs
    num_draws: int
    stage: str = "unet"

    @property
    def num_bytes(self) -> int:
        """Bytes of the inputs."""
        return sum(tensor.nbytes for tensor in list_tensors(self.inputs).values())


def list_tensors(inputs: DrawInputs) -> dict[str, Tensor]:
    """Return field → tensor of those that are there."""
    found = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


class FeaturesStage:
    """What the features parts of all tasks share."""

    def __init__(
        self,
        store: Store,
        layer: LayerSpec,
        latents_layer: LayerSpec,
        encoder: FeatureEncoder,
        *,
        device: Device,
        batch: int,
        run: str,
    ) -> None:
        self.store = store
        self.run = run
        self.layer = layer
        self.latents_layer = latents_layer
        self.encoder = encoder
        self.batch = batch
        self.device = device
        self.limit = BatchLimit(batch, what="UNet")
        self.hashers = ThreadPoolExecutor(NUM_HASHERS, "features-hash")
        _check_timesteps(layer, num_timesteps=len(encoder.alphas_cumprod))
        side = latents_layer.latents.size // LATENT_DOWNSCALE
        self.row_shapes = features_row_shapes(layer.features, encoder.shapes((side, side)))

    def open_part(self, latents: Commit, *, generation: int) -> "FeaturesPart":
        """Return the part of a latents commit's rows."""
        return FeaturesPart(self, latents, generation=generation)


def _check_timesteps(layer: LayerSpec, *, num_timesteps: int) -> None:
    """Refuse timesteps that the model's schedule has not: on a GPU nobody looks at them again."""
    chosen = layer.features.timesteps
    last = chosen.high - 1 if isinstance(chosen, UniformTimesteps) else max(chosen)
    if last >= num_timesteps:
        raise ValueError(
            f"{layer.folder}: timesteps must be below {num_timesteps}, those of the model's "
            f"schedule, but got {last}; choose others in the spec's features section"
        )


class FeaturesPart:
    """One task on its way into a features layer: a ``Part``.

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
        self._attempt = Attempt(
            stage.store.storage, stage.layer, latents.task, generation=generation
        )
        self._arrays: dict[str, Any] = {}

    def fetch(self) -> None:
        """Read the index and open the arrays."""
        store, layer = self._stage.store, self._stage.latents_layer
        index = store.read_index(self._latents).to_pydict()
        self._rows = list_rows(index, self._stage.layer.features)
        self._mean = store.open_array(layer, self._latents, "latent_mean")
        self._text = {
            name: store.open_array(layer, self._latents, name) for name in layer.text_arrays
        }

    def read(self) -> Generator[DrawBatch, None, None]:
        """Yield batches of draws with what they read, each distinct row once a batch."""
        draws = (draw for row in self._rows for draw in row)
        while batch := tuple(islice(draws, self._stage.batch)):
            yield self._read_batch(batch)

    def _read_batch(self, draws: Sequence[Draw]) -> DrawBatch:
        assert self._mean is not None, "it was fetched"
        pin = self._stage.device.pin
        latent_rows, latent_of = number_distinct([draw.latent_row for draw in draws])
        text_rows, text_of = number_distinct([draw.text_row for draw in draws])
        noise_keys, noise_of = number_distinct([draw.noise_key for draw in draws])
        draw_of = {draw.noise_key: draw for draw in draws}
        latent = self._mean.read_rows(latent_rows)
        seed = self._stage.layer.features.seed
        noise = [draw_view_noise(draw_of[key], latent.shape[1:], seed=seed) for key in noise_keys]
        text = {name: pin(array.read_rows(text_rows)) for name, array in self._text.items()}
        inputs = DrawInputs(
            latent=pin(latent),
            latent_of=pin(latent_of),
            text=text["text"],
            text_of=pin(text_of),
            noise=pin(torch.stack(noise).numpy()),
            noise_of=pin(noise_of),
            timestep=pin(np.array([draw.timestep for draw in draws])),
            pooled=text.get("text_pooled"),
        )
        return DrawBatch(inputs, len(draws))

    def compute(self, batch: DrawBatch) -> Iterator[Pending]:
        """Run the UNet up to the last block asked for."""
        return self.prepare_pass(batch).run(self._stage.device)

    def prepare_pass(self, batch: DrawBatch) -> Pass:
        """Bring a batch to the device and return what there is to compute of it."""
        stage = self._stage
        inputs = DrawInputs(
            **{name: stage.device.upload(x) for name, x in list_tensors(batch.inputs).items()}
        )
        factor = stage.latents_layer.scaling_factor

        def compute(rows: slice) -> Stored:
            found = inputs.encode(stage.encoder, scaling_factor=factor, rows=rows)
            return store_blocks(found, stage.layer.features)

        return Pass(stage.limit, batch.num_draws, compute)

    def write(self, batch: DrawBatch, results: Sequence[dict[str, np.ndarray]]) -> None:
        """Append a batch's features, the arrays side by side."""
        arrays = self._open_arrays()
        for result in results:
            writing = [
                self._stage.hashers.submit(arrays[name].append_chunks, values)
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

    def commit(self) -> PartDone:
        """Publish the attempt."""
        stage = self._stage
        self._open_arrays()  # of a task without a pair, too
        commit, outcome = self._attempt.commit(
            rows=self._latents.rows,
            pairs_sha256=self._latents.pairs_sha256,
            latents_generation=self._latents.generation,
            provenance=describe_provenance(
                stage.encoder, batch=stage.limit.num_rows, run=stage.run
            ),
        )
        return PartDone(commit, outcome == "won")

    def abandon(self) -> None:
        """Remove what was written unless it came as far as its record."""
        self._attempt.abandon()
