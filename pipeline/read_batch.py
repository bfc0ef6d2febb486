"""A batch that reads its keys and phrases only where somebody asks for them.

Training does not, and a task's index is then not kept for them.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pipeline.batch import Batch

Texts = tuple[tuple[str, ...], tuple[str, ...]]  # keys and phrases


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
