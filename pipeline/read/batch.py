"""A batch of pairs, the reused memory that it is read into, and its way to a device.

Data flow: memory that no batch uses any more -> the store's bytes are read straight into it ->
float16 and int8 travel to the device as they are stored -> there they become float32.
"""

import math
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.ldm.quantize import dequantize_int8
from pipeline.base.forks import renew_in_child
from pipeline.store.layout import block_name

Texts = tuple[tuple[str, ...], tuple[str, ...]]  # keys and phrases
POOL_BYTES = 2**30  # of memory kept for later batches, beside what batches in use hold
_probe = [np.empty(1)]
_IDLE_COUNT = sys.getrefcount(_probe[0])  # of an array that only a list refers to


@dataclass(frozen=True, slots=True)
class QuantizedFeature:
    """A feature as int8 ``values`` (B, C, h, w) and their float32 ``scale`` (B, C)."""

    values: Tensor
    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        """(B, C, h, w)."""
        return self.values.shape

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "QuantizedFeature":
        """Copy it to a device, still int8."""
        values = self.values.to(device, non_blocking=non_blocking)
        return QuantizedFeature(values, self.scale.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "QuantizedFeature":
        """Copy it to pinned memory."""
        return QuantizedFeature(self.values.pin_memory(), self.scale.pin_memory())

    def float(self) -> Tensor:
        """Return the float32 values (B, C, h, w)."""
        return dequantize_int8(self.values, self.scale)


def collect_features(
    blocks: Iterable[int], tensors: Mapping[str, Tensor]
) -> dict[int, Tensor | QuantizedFeature]:
    """Return block number → feature from the tensors of a features layer's arrays, by name."""
    found: dict[int, Tensor | QuantizedFeature] = {}
    for number in blocks:
        name = block_name(number)
        found[number] = tensors[name]
        if f"{name}_scale" in tensors:
            found[number] = QuantizedFeature(tensors[name], tensors[f"{name}_scale"])
    return found


@dataclass(frozen=True)
class PairBatch:
    """Some pairs in the order asked for, in pinned memory where the reader is for a CUDA device.

    ``inputs`` has those that were asked for of

    - latent: (B, 4, h, w) float32, the posterior mean times the scaling factor;
    - text: (B, T, D) float32, and text_pooled (B, P) float32 where the model has it (SDXL);
    - image: (B, H, W, 3) uint8;
    - features: block number → (B, C, h, w) as stored, float16 or a QuantizedFeature.

    ``mask`` is (B, H, W) uint8 of 0 and 1, of zeros for a negative; None where the reader reads no
    masks. ``ignore`` is (B, H, W) uint8, 1 where neither loss nor metrics count; None in every
    batch of a reader none of whose tasks has such a region. A phrase is "" where there is none.
    """

    inputs: dict[str, Any]
    mask: Tensor | None
    keys: tuple[str, ...]
    phrases: tuple[str, ...]
    ignore: Tensor | None = None

    @property
    def truth(self) -> Tensor:
        """The ``mask`` of a reader of masks, which every training and scoring has."""
        assert self.mask is not None, "the reader was opened with masks=False"
        return self.mask

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "PairBatch":
        """Copy it to a device, its values as they are; texts stay lazy.

        Lightning and Accelerate look for this, and DataLoader for ``pin_memory``.
        """
        return self._map(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PairBatch":
        """Copy it to pinned memory."""
        return self._map(lambda value: value.pin_memory())

    def _map(self, change: Callable[[Any], Any]) -> "PairBatch":
        """Return a batch of the same kind with every tensor changed."""
        held = {name: vars(self)[name] for name in ("inputs", "mask", "ignore")}
        batch = object.__new__(type(self))
        vars(batch).update(vars(self), **_map_tensors(held, change))
        return batch


def _map_tensors(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, Mapping):
        return {name: _map_tensors(x, change) for name, x in value.items()}
    return None if value is None else change(value)


def move_inputs(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Copy a batch's inputs to a device, where features become float32."""
    return {
        name: {key: x.to(device, non_blocking=True).float() for key, x in value.items()}
        if isinstance(value, Mapping)
        else value.to(device, non_blocking=True)  # blocks where memory is not pinned
        for name, value in inputs.items()
    }


class BatchMemory:
    """Pool of memory for batches, reused when no tensor refers to it. Threads may share it.

    Fresh memory costs a page fault for each 4 KiB, which halves the speed of reading. Pinned memory
    is torch's to pool: it waits until copies from it have ended.
    """

    def __init__(self, *, pinned: bool, max_bytes: int = POOL_BYTES) -> None:
        self._pinned = pinned
        self._max_bytes = max_bytes
        renew_in_child(self)

    def renew(self) -> None:
        """Forget the memory, of which a forked child's parent has the threads that use it."""
        self._lock = threading.Lock()
        self._arrays: list[np.ndarray] = []

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        """Return a tensor of undefined values, the caller's until its last view is gone."""
        if self._pinned:
            return torch.empty(shape, dtype=getattr(torch, dtype), pin_memory=True)
        num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        return torch.from_numpy(self._reuse(num_bytes)[:num_bytes].view(dtype).reshape(shape))

    def _reuse(self, num_bytes: int) -> np.ndarray:
        with self._lock:
            for number in range(len(self._arrays)):
                if sys.getrefcount(self._arrays[number]) > _IDLE_COUNT:
                    continue  # in use; where it is not, nobody can get a view but from here
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

    With NumPy: torch would start a pool of OpenMP threads in the thread that reads ahead, and
    training steps wait for their cores: a ZNet's took 1.3 times as long on two.
    """
    wide = torch.empty(half.shape, dtype=torch.float32, pin_memory=half.is_pinned())
    np.copyto(wide.numpy(), half.numpy())
    return wide


class LazyPairBatch(PairBatch):
    """A batch whose keys and phrases are read when asked for, or when it is pickled."""

    def __init__(
        self,
        inputs: dict[str, Any],
        mask: Tensor | None,
        read_texts: Callable[[], Texts],
        ignore: Tensor | None,
    ) -> None:
        vars(self).update(inputs=inputs, mask=mask, ignore=ignore, _read=read_texts, _texts=None)

    def _read_texts(self) -> Texts:
        texts: Texts | None = vars(self)["_texts"]
        if texts is None:
            texts = vars(self)["_read"]()
            vars(self).update(_texts=texts)  # threads may both do so: texts are the same
        return texts

    @property
    def keys(self) -> tuple[str, ...]:
        """The samples' keys. Raises DamagedStoreError where the task's index is damaged."""
        return self._read_texts()[0]

    @property
    def phrases(self) -> tuple[str, ...]:
        """The pairs' phrases; raises as ``keys``."""
        return self._read_texts()[1]

    def __reduce__(self) -> tuple[Any, ...]:
        return PairBatch, (self.inputs, self.mask, self.keys, self.phrases, self.ignore)
