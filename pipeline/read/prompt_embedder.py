"""Embeds the prompts of a layer that stores none (``text: none``), as it would have stored them."""

import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.base.forks import renew_in_child
from pipeline.spec.layer import LayerSpec
from pipeline.store.prompt_cache import PromptCache


class PromptEmbedder:
    """The text encoder of a latents layer, opened when it is first asked. Threads may share it.

    Pickling takes along how it is opened, and neither the model nor what it has embedded.
    """

    def __init__(self, layer: LayerSpec, *, device: torch.device | None, model: str | None) -> None:
        self._layer, self._device, self._model = layer, device or torch.device("cpu"), model
        self._encoder: nn.Module | None = None
        self._cache = PromptCache()
        renew_in_child(self)

    def renew(self) -> None:
        """Take another lock: a thread may hold this one that a forked child lacks."""
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        opened = partial(PromptEmbedder, device=self._device, model=self._model)
        return opened, (self._layer,)

    def embed(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Return array name → rows (len(prompts), …) float16, in the prompts' order.

        Each prompt is computed alone: which others a batch has must not change its last digits.

        Raises:
            ModelFilesError: the layer's model is not there or is another one.
            FloatingPointError: an embedding is NaN, infinite or beyond float16's 65,504.
        """
        distinct = list(dict.fromkeys(prompts))
        with self._lock:
            known = self._cache.get_known(distinct)
            results = [self._encode(prompt) for prompt in distinct if prompt not in known]
            rows = self._cache.merge(distinct, known, results)
        numbers = {prompt: number for number, prompt in enumerate(distinct)}
        places = [numbers[prompt] for prompt in prompts]
        return {name: values[places] for name, values in rows.items()}

    @torch.inference_mode()
    def _encode(self, prompt: str) -> dict[str, np.ndarray]:
        if self._encoder is None:
            # Importing it takes seconds, and few readers need it.
            from pipeline.spec.open_model import open_text_encoder

            self._encoder = open_text_encoder(self._layer, device=self._device, model=self._model)
        found = zip(self._layer.text_arrays, self._encoder([prompt]), strict=False)
        rows = {name: values.to(torch.float16).cpu() for name, values in found}
        if not all(bool(values.isfinite().all()) for values in rows.values()):
            raise FloatingPointError(
                f"{self._layer.folder}: the text encoder gives NaN, or more than float16 holds, "
                f"for the prompt {prompt!r}; encode a layer with compute: float32"
            )
        return {name: values.numpy() for name, values in rows.items()}
