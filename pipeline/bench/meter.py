"""Seconds or FLOPs per part of a network, by hooks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from models.heads.attention_pool import AttentionPool2d

PARTS_BY_NAME = {
    "attn1": "self-attention",
    "attn2": "text attention",
    "attn3": "feature attention",
    "ff": "feed-forward",
    "stem": "stem",
    "final": "final",
}


@dataclass(slots=True)
class Meter:
    """Adds up by how much a counter grows in each part of some work.

    Parts may be nested; growth is added to the innermost one that runs, outside of any to none.

    Args:
        read: returns the counter: a clock's seconds, or the FLOPs counted so far.
        totals: part to its sum.
    """

    read: Callable[[], float]
    totals: dict[str, float] = field(default_factory=dict)
    _running: list[str] = field(default_factory=list)
    _last: float = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add what runs inside to ``name``, without the parts nested in it."""
        depth = len(self._running)
        self._open(name)
        try:
            yield
        finally:
            self._add()
            del self._running[depth:]

    @contextmanager
    def watch(self, modules: Mapping[str, Sequence[nn.Module]]) -> Iterator[None]:
        """Add every forward pass of these modules to the part that they are listed under."""
        handles = []
        for name, some in modules.items():
            for module in some:
                enter = partial(self._open, name)
                handles.append(module.register_forward_pre_hook(enter))
                handles.append(module.register_forward_hook(self._close))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _open(self, name: str, *_: Any) -> None:
        self._add()
        self._running.append(name)

    def _close(self, *_: Any) -> None:
        self._add()
        self._running.pop()

    def _add(self) -> None:
        now = self.read()
        if self._running:
            part = self._running[-1]
            self.totals[part] = self.totals.get(part, 0.0) + now - self._last
        self._last = now


def find_parts(root: nn.Module, *, prefix: str) -> dict[str, list[nn.Module]]:
    """Return part to its modules: residual blocks, attentions and so on, none inside another."""
    found: dict[str, list[nn.Module]] = {}
    for name, module in root.named_modules():
        part = PARTS_BY_NAME.get(name.rpartition(".")[2])
        if isinstance(module, ResnetBlock2D):
            part = "residual blocks"
        elif isinstance(module, AttentionPool2d):
            part = "attention pools"
        if part is not None:
            found.setdefault(prefix + part, []).append(module)
    return found
