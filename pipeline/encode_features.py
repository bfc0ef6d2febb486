"""Encoding one committed task of a latents layer into a features layer.

Data flow: latents and text embeddings from the store -> noise and timestep by (seed, key, view,
draw) -> (pair x draw) batches through the UNet -> storage form -> arrays -> commit. No image, no
VAE and no text encoder takes part, so a second features layer costs only its own UNet passes, and
a feature depends on the stored latent, not on which run wrote it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.ldm import FeatureEncoder
from models.noise import draw_integer, draw_noise
from models.quantize import quantize_int8
from pipeline.arrays import ShardedArray
from pipeline.attempt import Attempt, check_finite, describe_provenance, to_float16
from pipeline.commit import Commit
from pipeline.layout import block_name, features_row_shapes
from pipeline.spec import LATENT_DOWNSCALE, FeaturesSpec, LayerSpec, UniformTimesteps
from pipeline.store import Store


@dataclass(frozen=True, slots=True)
class Draw:
    """One (timestep, noise) of one row: what a UNet pass is made of."""

    key: str
    view: int
    number: int
    timestep: int
    latent_row: int
    text_row: int


class FeaturesStage:
    """Turns committed tasks of a latents layer into tasks of one features layer."""

    def __init__(
        self,
        store: Store,
        layer: LayerSpec,
        latents_layer: LayerSpec,
        encoder: FeatureEncoder,
        *,
        batch: int,
    ) -> None:
        self._store = store
        self._layer = layer
        self._latents_layer = latents_layer
        self._encoder = encoder
        self._batch = batch
        side = latents_layer.latents.size // LATENT_DOWNSCALE
        self._row_shapes = features_row_shapes(layer.features, encoder.shapes((side, side)))

    def encode_task(self, latents: Commit, *, generation: int) -> tuple[Commit, bool]:
        """Encode the features of a latents commit's rows; return the record and whether ours won.

        Raises:
            DamagedStoreError: the latents are missing or altered.
            FloatingPointError: the UNet gave NaN or infinity.
            OSError: the store failed.
        """
        features = self._layer.features
        index = self._store.read_index(latents).to_pydict()
        mean = self._store.open_array(self._latents_layer, latents, "latent_mean")
        text = {
            name: self._store.open_array(self._latents_layer, latents, name)
            for name in self._latents_layer.text_arrays
        }
        rows = list_rows(index, features)
        with Attempt(
            self._store.storage, self._layer, latents.task, generation=generation
        ) as attempt:
            arrays = attempt.open_arrays(self._row_shapes)
            for row in rows:
                timesteps = [draw.timestep for draw in row]
                arrays["timestep"].append_rows(np.array([timesteps], dtype=np.int16))
            draws = (draw for row in rows for draw in row)
            while batch := tuple(islice(draws, self._batch)):
                self._encode_batch(batch, mean, text, arrays)
            commit, outcome = attempt.commit(
                rows=latents.rows,
                pairs_sha256=latents.pairs_sha256,
                latents_generation=latents.generation,
                provenance=describe_provenance(
                    self._encoder.device, batch=self._batch, tuning=self._encoder.tuning
                ),
            )
        return commit, outcome == "won"

    def _encode_batch(
        self,
        draws: Sequence[Draw],
        mean: ShardedArray,
        text: Mapping[str, ShardedArray],  # by the layer's text_arrays
        arrays: dict[str, Any],
    ) -> None:
        found = encode_draws(
            self._encoder,
            draws,
            latent=np.stack([mean.read_row(draw.latent_row) for draw in draws]),
            **{
                name: np.stack([array.read_row(draw.text_row) for draw in draws])
                for name, array in text.items()
            },
            scaling_factor=self._latents_layer.scaling_factor,
            seed=self._layer.features.seed,
        )
        for number, feature in found.items():
            for name, values in to_stored(number, feature, self._layer.features).items():
                arrays[name].append_chunks(values)


def encode_draws(
    encoder: FeatureEncoder,
    draws: Sequence[Draw],
    *,
    latent: np.ndarray,
    text: np.ndarray,
    text_pooled: np.ndarray | None = None,
    scaling_factor: float,
    seed: int,
) -> dict[int, Tensor]:
    """Return block number → feature (B, C, h, w) float32 for some draws.

    ``latent`` (B, 4, h, w) is the posterior mean unscaled, ``text`` (B, T, D) the embedding and
    ``text_pooled`` (B, P) SDXL's pooled one, all float16 as a store holds them: live and cached
    features start from the same numbers.
    """
    return encoder.encode(
        torch.from_numpy(latent).float() * scaling_factor,
        stack_noise(draws, latent.shape[1:], seed=seed),
        torch.tensor([draw.timestep for draw in draws]),
        torch.from_numpy(text).float(),
        None if text_pooled is None else torch.from_numpy(text_pooled).float(),
    )


def to_stored(number: int, feature: Tensor, spec: FeaturesSpec) -> dict[str, np.ndarray]:
    """Return array name → values of a block's feature in the form that the layer stores.

    Raises:
        FloatingPointError: a value is NaN or infinite, or does not fit.
    """
    name = block_name(number)
    if spec.storage == "float16":
        return {name: to_float16(name, feature)}
    check_finite(name, feature)
    quantized, scale = quantize_int8(feature)
    return {name: quantized.cpu().numpy(), f"{name}_scale": scale.cpu().numpy()}


def list_rows(index: Mapping[str, Sequence[Any]], features: FeaturesSpec) -> list[list[Draw]]:
    """Return the draws of every row of a features layer, in row order.

    A row is a pair, or with ``condition: empty`` a view; ``index`` has the latents' columns. The
    timestep and the noise of a draw are those of its view, whatever the phrase.
    """
    columns = ("key", "view", "latent_row", "text_row")
    rows: Iterable[tuple[str, int, int, int]] = zip(*(index[name] for name in columns), strict=True)
    if features.condition == "empty":
        views = {latent_row: (key, view) for key, view, latent_row, _ in rows}
        rows = ((key, view, latent_row, 0) for latent_row, (key, view) in sorted(views.items()))
    return [
        [
            Draw(key, view, number, choose_timestep(features, key, view, number), latent, text)
            for number in range(features.num_draws)
        ]
        for key, view, latent, text in rows
    ]


def choose_timestep(features: FeaturesSpec, key: str, view: int, draw: int) -> int:
    """Return the timestep of one draw of one view, in [0, 1000)."""
    chosen = features.timesteps
    if not isinstance(chosen, UniformTimesteps):
        return chosen[draw]
    return draw_integer(
        chosen.low,
        chosen.high,
        purpose="timestep",
        seed=features.seed,
        key=key,
        view=view,
        draw=draw,
    )


def stack_noise(draws: Sequence[Draw], shape: tuple[int, ...], *, seed: int) -> Tensor:
    """Return the noise of some draws, (len(draws), *shape) float32."""
    return torch.stack(
        [
            draw_noise(shape, seed=seed, key=draw.key, view=draw.view, draw=draw.number)
            for draw in draws
        ]
    )
