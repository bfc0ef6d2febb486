"""Draws of a features layer: each row's timesteps and noise, and the UNet pass over them.

Both encoding and live segmentation use these, so that they compute the same features.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.ldm.draws import draw_integer
from models.ldm.encoders import FeatureEncoder
from models.ldm.noise import draw_noise
from pipeline.spec.fields import FeaturesSpec, UniformTimesteps


@dataclass(frozen=True, slots=True)
class Draw:
    """One timestep and noise of one row: one row of a UNet pass."""

    key: str
    view: int
    number: int
    timestep: int
    latent_row: int
    text_row: int


@dataclass(frozen=True, slots=True)
class DrawInputs:
    """Input of a UNet pass over B draws, each distinct row once, on one device.

    ``latent`` (U, 4, h, w) float16, posterior means unscaled; ``text`` (V, T, D) float16 and
    ``pooled`` (V, P) float16, SDXL's; ``noise`` (N, 4, h, w) float32; ``timestep`` (B,) int64;
    ``latent_of``, ``text_of`` and ``noise_of`` (B,) int64: each draw's row in these.
    """

    latent: Tensor
    latent_of: Tensor
    text: Tensor
    text_of: Tensor
    noise: Tensor
    noise_of: Tensor
    timestep: Tensor
    pooled: Tensor | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Field → tensor, without a field that is None."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def encode(
        self, encoder: FeatureEncoder, *, scaling_factor: float, rows: slice = slice(None)
    ) -> dict[int, Tensor]:
        """Return block number → feature (B, C, h, w) float32 of some of the draws."""
        text_of = self.text_of[rows]
        return encoder.encode_features(
            self.latent[self.latent_of[rows]].float() * scaling_factor,
            self.noise[self.noise_of[rows]],
            self.timestep[rows],
            self.text[text_of].float(),
            None if self.pooled is None else self.pooled[text_of].float(),
        )


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
    given, seed = features.timesteps, features.seed
    if not isinstance(given, UniformTimesteps):
        return given[draw]
    return draw_integer(
        given.low, given.high, purpose="timestep", seed=seed, key=key, view=view, draw=draw
    )


ReadRows = Callable[[Sequence[int]], np.ndarray]


def gather_inputs(
    draws: Sequence[Draw],
    *,
    read_latents: ReadRows,
    read_text: Mapping[str, ReadRows],
    seed: int,
    pin: Callable[[np.ndarray], Tensor] = torch.from_numpy,
) -> DrawInputs:
    """Read what a UNet pass over some draws needs, each distinct row once.

    ``read_text`` has a function for each of the layer's text arrays; ``pin`` makes the tensors.
    """
    latent_rows, latent_of = number_distinct([draw.latent_row for draw in draws])
    text_rows, text_of = number_distinct([draw.text_row for draw in draws])
    # Noise depends on these alone, so that all phrases of a view have the same.
    noise_keys, noise_of = number_distinct([(draw.key, draw.view, draw.number) for draw in draws])
    latent = read_latents(latent_rows)
    noise = [
        draw_noise(latent.shape[1:], seed=seed, key=key, view=view, draw=number)
        for key, view, number in noise_keys
    ]
    text = {name: pin(read(text_rows)) for name, read in read_text.items()}
    return DrawInputs(
        latent=pin(latent),
        latent_of=pin(latent_of),
        text=text["text"],
        text_of=pin(text_of),
        noise=pin(torch.stack(noise).numpy()),
        noise_of=pin(noise_of),
        timestep=pin(np.array([draw.timestep for draw in draws])),
        pooled=text.get("text_pooled"),
    )


def number_distinct(values: Sequence[Any]) -> tuple[list[Any], np.ndarray]:
    """Return the distinct values in order of first appearance, and each value's number there.

    The numbers are (len(values),) int64.
    """
    numbers: dict[Any, int] = {}
    of = [numbers.setdefault(value, len(numbers)) for value in values]
    return list(numbers), np.array(of, dtype=np.int64)
