"""Embeddings of prompts that were encoded before, in the form that a store holds them in.

A corpus says the same things again and again: with it a prompt that a process has met is not
encoded anew for the next tar. Bounded by bytes; what was not asked for longest goes first.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

MAX_BYTES = 256 * 2**20
"""2,200 prompts at SD 1.4's 118 KB each."""


@dataclass(frozen=True, slots=True, eq=False)
class Embedding:
    """One prompt's rows by array name: ``text`` (T, D) and, for SDXL, ``text_pooled`` (P,)."""

    rows: dict[str, np.ndarray]

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows."""
        return sum(row.nbytes for row in self.rows.values())


class PromptCache:
    """Prompt → embedding, for threads that find and threads that fill."""

    def __init__(self, *, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._held: OrderedDict[str, Embedding] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._held)

    def find(self, prompts: Sequence[str]) -> dict[str, Embedding]:
        """Return those that are known."""
        with self._lock:
            known = {prompt: self._held[prompt] for prompt in prompts if prompt in self._held}
            for prompt in known:
                self._held.move_to_end(prompt)
        return known

    def fill(
        self,
        prompts: Sequence[str],
        known: Mapping[str, Embedding],
        results: Sequence[Mapping[str, np.ndarray]],
    ) -> dict[str, np.ndarray]:
        """Join known embeddings and new results, and keep the new.

        Args:
            prompts: distinct, in the order of their rows.
            known: those that were not encoded.
            results: array name → rows, of one pass after another over the prompts not known.

        Returns:
            Array name → rows (len(prompts), …).
        """
        new = (
            Embedding({name: rows[row].copy() for name, rows in result.items()})
            for result in results
            for row in range(len(next(iter(result.values()))))
        )
        found = {prompt: known[prompt] if prompt in known else next(new) for prompt in prompts}
        self._keep({prompt: found[prompt] for prompt in prompts if prompt not in known})
        names = next(iter(found.values())).rows
        return {name: np.stack([found[prompt].rows[name] for prompt in prompts]) for name in names}

    def _keep(self, new: Mapping[str, Embedding]) -> None:
        with self._lock:
            for prompt, embedding in new.items():
                if prompt not in self._held:
                    self._num_bytes += embedding.num_bytes
                self._held[prompt] = embedding
            while self._num_bytes > self._max_bytes:
                _, oldest = self._held.popitem(last=False)
                self._num_bytes -= oldest.num_bytes
