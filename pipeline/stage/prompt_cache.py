"""Embeddings of prompts that were encoded before, in the form that a store holds them in.

A corpus says the same things again and again: with it a prompt that a process has met is not
encoded anew for the next tar. Bounded by bytes; what was not asked for longest goes first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.base.lru_cache import LruCache

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
        self._held: LruCache[str, Embedding] = LruCache(
            max_bytes, cost=lambda found: found.num_bytes
        )

    def __len__(self) -> int:
        return len(self._held)

    def find(self, prompts: Sequence[str]) -> dict[str, Embedding]:
        """Return those that are known."""
        found = {prompt: self._held.get(prompt) for prompt in prompts}
        return {prompt: embedding for prompt, embedding in found.items() if embedding is not None}

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
        for prompt in prompts:
            if prompt not in known:
                self._held.put(prompt, found[prompt])
        names = next(iter(found.values())).rows
        return {name: np.stack([found[prompt].rows[name] for prompt in prompts]) for name in names}
