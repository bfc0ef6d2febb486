"""Converts outputs to stored dtypes on the device and counts non-finite values there.

Nothing here waits for the device, except ``to_arrays``: the counts travel with the values.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.ldm.quantize import quantize_int8
from pipeline.spec.fields import FeaturesSpec
from pipeline.store.layout import block_name


@dataclass(frozen=True, slots=True)
class Stored:
    """Values as a store holds them, and how many of them are not finite.

    ``values``: array name → contiguous (rows, …). ``num_bad``: name → 0-dim int64.
    """

    values: dict[str, Tensor]
    num_bad: dict[str, Tensor]

    def __or__(self, other: "Stored") -> "Stored":
        return Stored(self.values | other.values, self.num_bad | other.num_bad)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return the values on the CPU; waits for the device.

        Raises:
            FloatingPointError: a value is NaN, infinite or beyond float16's 65,504.
        """
        for name, bad in self.num_bad.items():
            if count := int(bad):
                raise FloatingPointError(
                    f"{name}: expected finite float16 values, got {count} NaN or infinite of "
                    f"{self.values[name].numel()}; nothing of this task was committed. Try "
                    "compute: float32, and look at the model's weights"
                )
        return {name: values.cpu().numpy() for name, values in self.values.items()}


def store_float16(name: str, values: Tensor) -> Stored:
    """Return values as float16."""
    half = values.to(torch.float16, memory_format=torch.contiguous_format)
    return Stored({name: half.contiguous()}, {name: _count_bad(half)})


def store_text(tokens: Tensor, pooled: Tensor | None) -> Stored:
    """Return a text encoder's output as float16 ``text`` and, for SDXL, ``text_pooled``."""
    stored = store_float16("text", tokens)
    return stored if pooled is None else stored | store_float16("text_pooled", pooled)


def store_blocks(features: Mapping[int, Tensor], spec: FeaturesSpec) -> Stored:
    """Return block number → feature (B, C, h, w) in the storage type of a layer's spec."""
    whole = Stored({}, {})
    for number, feature in features.items():
        name = block_name(number)
        if spec.storage == "float16":
            whole |= store_float16(name, feature)
        else:
            quantized, scale = quantize_int8(feature)
            values = {name: quantized.contiguous(), f"{name}_scale": scale.contiguous()}
            whole |= Stored(values, {name: _count_bad(feature)})
    return whole


def _count_bad(values: Tensor) -> Tensor:
    return (~torch.isfinite(values)).sum()
