"""A batch of pairs as it leaves the store, the memory it is read into, its way to a device.

Data flow: memory that no batch uses any more is taken again -> the store's bytes are read straight
into it -> float16 and int8 travel as they are stored -> on the device they become float32.
"""

import math
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.ldm.quantize import dequantize_int8

Texts = tuple[tuple[str, ...], tuple[str, ...]]  # keys and phrases
POOL_BYTES = 2**30  # of memory kept for later batches, beside what batches in use hold
_probe = [np.empty(1)]
_IDLE_COUNT = sys.getrefcount(_probe[0])  # of an array that only a list refers to


@dataclass(frozen=True, slots=True)
class QuantizedFeature:
    """A feature as int8 values (B, C, h, w) and their float32 scale (B, C)."""

    values: Tensor
    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        """(B, C, h, w)."""
        return self.values.shape

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "QuantizedFeature":
        """Return it on a device, still int8."""
        values = self.values.to(device, non_blocking=non_blocking)
        return QuantizedFeature(values, self.scale.to(device, non_blocking=non_blocking))

    def float(self) -> Tensor:
        """Return the float32 values (B, C, h, w)."""
        return dequantize_int8(self.values, self.scale)


@dataclass(frozen=True)
class Batch:
    """Some pairs, in the order asked for.

    ``inputs`` has what was asked for of: latent (B, 4, h, w) float32, the posterior mean times the
    scaling factor; text (B, T, D) float32, with text_pooled (B, P) float32 where the layer's model
    has it (SDXL); image (B, H, W, 3) uint8; features, block number → (B, C, h, w) as stored:
    float16, or a QuantizedFeature; ``move_inputs`` makes them float32 on the device.
    ``mask`` is (B, H, W) uint8 of 0 and 1. Large tensors are in pinned memory where the reader was
    made for a CUDA device.
    """

    inputs: dict[str, Any]
    mask: Tensor
    keys: tuple[str, ...]
    phrases: tuple[str, ...]


def move_inputs(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a batch's inputs on a device, features as float32."""
    return {
        name: {key: _move(x, device).float() for key, x in value.items()}
        if isinstance(value, Mapping)
        else _move(value, device)
        for name, value in inputs.items()
    }


def _move(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True)  # blocks all the same where memory is not pinned


class BatchMemory:
    """Memory to read batches into. Threads may share it.

    Fresh memory of a batch's size costs a page fault for each 4 KiB, which halves the speed of
    reading; so what is free again is given out again. Pinned memory comes from torch, which waits
    with that until copies from it have ended.
    """

    def __init__(self, *, pinned: bool, max_bytes: int = POOL_BYTES) -> None:
        self._pinned = pinned
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._arrays: list[np.ndarray] = []

    def take(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        """Return a tensor (values undefined) that is the caller's until its last view is gone."""
        if self._pinned:
            return torch.empty(shape, dtype=getattr(torch, dtype), pin_memory=True)
        num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        return torch.from_numpy(self._find(num_bytes)[:num_bytes].view(dtype).reshape(shape))

    def _find(self, num_bytes: int) -> np.ndarray:
        with self._lock:
            for number in range(len(self._arrays)):
                # No view and no tensor has it any more, and nobody can get one but from here.
                if sys.getrefcount(self._arrays[number]) > _IDLE_COUNT:
                    continue
                if num_bytes <= self._arrays[number].nbytes <= 2 * num_bytes:
                    self._arrays.append(self._arrays.pop(number))
                    return self._arrays[-1]
            array = np.empty(num_bytes, np.uint8)
            self._arrays.append(array)
            while sum(kept.nbytes for kept in self._arrays) > self._max_bytes:
                del self._arrays[0]  # in use or not: its tensors keep it as long as they need it
            return array


def widen(half: Tensor) -> Tensor:
    """Return float16 values as float32, pinned if they were.

    By NumPy: an operation of torch's in a thread that reads ahead would start a pool of OpenMP
    threads there, and make the step wait for cores: a ZNet's took 1.3 times as long on two.
    """
    wide = torch.empty(half.shape, dtype=torch.float32, pin_memory=half.is_pinned())
    np.copyto(wide.numpy(), half.numpy())
    return wide


class ReadBatch(Batch):
    """A batch as a reader gives it. Pickling reads the texts, and leaves the reader behind."""

    def __init__(
        self, inputs: dict[str, Any], mask: Tensor, read_texts: Callable[[], Texts]
    ) -> None:
        vars(self).update(inputs=inputs, mask=mask, _read=read_texts, _texts=None)

    def _find(self) -> Texts:
        texts: Texts | None = vars(self)["_texts"]
        if texts is None:
            texts = vars(self)["_read"]()
            vars(self).update(_texts=texts)  # by each of several threads: they are the same
        return texts

    @property
    def keys(self) -> tuple[str, ...]:
        """The samples' keys. Raises DamagedStoreError where the task's index is damaged."""
        return self._find()[0]

    @property
    def phrases(self) -> tuple[str, ...]:
        """The pairs' phrases; raises as ``keys``."""
        return self._find()[1]

    def __reduce__(self) -> tuple[Any, ...]:
        return Batch, (self.inputs, self.mask, self.keys, self.phrases)
