"""ZNet: the LDM's UNet on the clean latent and the text."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.heads.unet_head import UNetHead


class ZNet(UNetHead):
    """Segments from the clean latent and the text alone.

    Args:
        unet_config: config of the LDM's UNet (diffusers' UNet2DConditionModel).
    """

    name = "znet"
    reads = frozenset({"latent", "text"})

    def __init__(self, *, unet_config: Mapping[str, Any]) -> None:
        super().__init__(unet_config=unet_config, arguments={})

    def forward(self, *, latent: Tensor, text: Tensor, text_pooled: Tensor | None = None) -> Tensor:
        """Return mask logits (B, 1, H, W).

        Args:
            latent: (B, 4, H/8, W/8) float, clean and scaled; H and W multiples of 64.
            text: (B, tokens, width) float, the prompt's embedding.
            text_pooled: (B, pooled width) float, read where the LDM's UNet takes it (SDXL).

        Raises:
            ValueError: a shape is another one.
        """
        return self.segment(latent, text, text_pooled)
