"""By how much a clock, or a count of FLOPs, advances in each part of a network's work."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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
    """Charges what ``read`` advances by to the innermost open part.

    ``totals`` maps a part to its sum; what runs outside of any part is charged to none.
    """

    read: Callable[[], float]
    totals: dict[str, float] = field(default_factory=dict)
    _open: list[str] = field(default_factory=list)
    _last: float = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Charge what runs inside to ``name``, but for parts opened inside."""
        depth = len(self._open)
        self._enter(name)
        try:
            yield
        finally:
            self._charge()
            del self._open[depth:]

    @contextmanager
    def watch(self, modules: Mapping[str, Sequence[nn.Module]]) -> Iterator[None]:
        """Charge every forward of these modules to the part that they are listed under."""
        handles = []
        for name, some in modules.items():
            for module in some:

                def enter(module: nn.Module, args: Any, name: str = name) -> None:
                    self._enter(name)

                def leave(module: nn.Module, args: Any, output: Any) -> None:
                    self._charge()
                    self._open.pop()

                handles.append(module.register_forward_pre_hook(enter))
                handles.append(module.register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> None:
        self._charge()
        self._open.append(name)

    def _charge(self) -> None:
        now = self.read()
        if self._open:
            part = self._open[-1]
            self.totals[part] = self.totals.get(part, 0.0) + now - self._last
        self._last = now


def find_parts(root: nn.Module, *, prefix: str) -> dict[str, list[nn.Module]]:
    """Group a network's modules by what they are; none lies inside another."""
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
