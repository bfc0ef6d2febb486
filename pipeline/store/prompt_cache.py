"""Cache of prompt embeddings, bounded by bytes, as a store holds them.

Captions of a corpus repeat: a prompt that this process has encoded for one tar is not encoded again
for the next.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.base.lru_cache import LruCache

MAX_BYTES = 256 * 2**20
"""2,200 prompts at SD 1.4's 118 KB each."""

Embedding = Mapping[str, np.ndarray]
"""One prompt's row of each text array: ``text`` (T, D) and, for SDXL, ``text_pooled`` (P,)."""


def count_bytes(embedding: Embedding) -> int:
    """Return the bytes of an embedding."""
    return sum(row.nbytes for row in embedding.values())


class PromptCache:
    """Thread-safe cache prompt → embedding; the least recently used go first."""

    def __init__(self, *, max_bytes: int = MAX_BYTES) -> None:
        self._held: LruCache[str, Embedding] = LruCache(max_bytes, cost=count_bytes)

    def get_known(self, prompts: Sequence[str]) -> dict[str, Embedding]:
        """Return the embeddings that are in the cache."""
        found = {prompt: self._held.get(prompt) for prompt in prompts}
        return {prompt: embedding for prompt, embedding in found.items() if embedding is not None}

    def merge(
        self,
        prompts: Sequence[str],
        known: Mapping[str, Embedding],
        results: Sequence[Mapping[str, np.ndarray]],
    ) -> dict[str, np.ndarray]:
        """Return array name → rows (len(prompts), …) of distinct prompts; cache the new ones.

        ``results`` are array name → rows, of one pass after another over the prompts that are not
        in ``known``.
        """
        new = (
            {name: rows[row].copy() for name, rows in result.items()}
            for result in results
            for row in range(len(next(iter(result.values()))))
        )
        found = {prompt: known[prompt] if prompt in known else next(new) for prompt in prompts}
        for prompt in prompts:
            if prompt not in known:
                self._held.put(prompt, found[prompt])
        return {name: np.stack([x[name] for x in found.values()]) for name in found[prompts[0]]}
