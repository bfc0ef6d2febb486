"""ZNet: the LDM's UNet on the clean latent and the text."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.heads.unet_head import UNetHead


class ZNet(UNetHead):
    """Segments from the clean latent and the text alone."""

    name = "znet"
    reads = frozenset({"latent", "text"})

    def __init__(self, *, unet_config: Mapping[str, Any]) -> None:
        super().__init__(unet_config, {})

    def forward(self, *, latent: Tensor, text: Tensor, text_pooled: Tensor | None = None) -> Tensor:
        """Return mask logits (B, 1, H, W); H and W are multiples of 64. Inputs are as of ``Head``.

        Raises:
            ValueError: a shape is another one.
        """
        return self.segment(latent, text, text_pooled)
