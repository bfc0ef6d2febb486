"""RGBNet: the paper's baseline, ZNet's network on the image instead of its latent.

Shape suffixes: B batch, H/W image height and width, C channels.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.heads.unet_head import UNetHead
from models.ldm.unet_config import LATENT_DOWNSCALE

STEM_PART = 5  # the UNet's first width over the stem's: 64, 128 and 256 channels at SD 1.4's 320
MIN_STEM_WIDTH = 8


class RGBNet(UNetHead):
    """Segments from the RGB image and the text; its UNet starts from the LDM's as ZNet's does.

    The paper adds learnable convolutions before the UNet but gives neither their number nor widths.
    Here: three 3×3 convolutions of stride 2 with SiLU, to a fifth of the UNet's first width, then
    twice and four times that, and a 1×1 convolution to the UNet's input channels. That is the least
    that brings an image to the latent's size one octave at a time, as the VAE's encoder does:
    372,000 parameters beside the UNet's 860 million. Weights start from He's normal distribution,
    so that the UNet sees values of the scale it was trained on.
    """

    name = "rgbnet"
    reads = frozenset({"image", "text"})

    def __init__(self, *, unet_config: Mapping[str, Any]) -> None:
        super().__init__(unet_config, {})
        first = max(MIN_STEM_WIDTH, self.unet.config.block_out_channels[0] // STEM_PART)
        layers: list[nn.Module] = []
        for before, after in ((3, first), (first, 2 * first), (2 * first, 4 * first)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.SiLU()]
        layers.append(nn.Conv2d(4 * first, self.unet.config.in_channels, 1))
        self.stem = nn.Sequential(*layers)
        for name, parameter in self.stem.named_parameters():
            if name.endswith("weight"):
                nn.init.kaiming_normal_(parameter, nonlinearity="relu")
            else:
                nn.init.zeros_(parameter)

    def forward(self, *, image: Tensor, text: Tensor, text_pooled: Tensor | None = None) -> Tensor:
        """Return mask logits (B, 1, H, W); inputs are as of ``Head``.

        The image is uint8 in 0..255 or float in 0..1; H and W are multiples of 64. The range of
        floats is checked on the CPU alone: on a GPU that would wait for the device at every step.

        Raises:
            ValueError: a shape, dtype or range is another one.
        """
        shape = tuple(image.shape)
        if len(shape) != 4 or shape[3] != 3:
            raise ValueError(f"RGBNet: image must be (B, H, W, 3), got {shape}")
        if shape[0] == 0:
            raise ValueError(
                f"RGBNet: image must have at least one row, got {shape}; skip empty batches"
            )
        step = LATENT_DOWNSCALE * 2 ** (len(self.unet.config.block_out_channels) - 1)
        if shape[1] % step or shape[2] % step or 0 in shape:
            raise ValueError(
                f"RGBNet: image sides must be multiples of {step} px, got {shape[1]}×{shape[2]}; "
                "crop or resize the view"
            )
        return self.segment(self.stem(self._scale(image)), text, text_pooled)

    def _scale(self, image_BHWC: Tensor) -> Tensor:
        """Bring the image to (B, 3, H, W) in -1..1, in the parameters' dtype."""
        image_BCHW = image_BHWC.permute(0, 3, 1, 2)
        if image_BHWC.dtype == torch.uint8:
            return image_BCHW.to(self.dtype) / 127.5 - 1.0
        if not image_BHWC.is_floating_point():
            raise ValueError(f"RGBNet: image must be uint8 or float, got {image_BHWC.dtype}")
        if image_BHWC.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = (float(edge) for edge in image_BHWC.detach().aminmax())
            if not (low >= 0.0 and high <= 1.0):  # NaN is neither
                raise ValueError(
                    f"RGBNet: a float image must be in 0..1, got {low:g} to {high:g}; divide bytes "
                    "by 255, or give them as uint8"
                )
        return image_BCHW.to(self.dtype) * 2.0 - 1.0
