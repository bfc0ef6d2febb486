"""A head that the package does not know: all of it is in this file."""

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from models.heads.head import Head
from models.heads.options import BlockOptions


class FifthOptions(BlockOptions):
    """Which blocks it reads, and an option of its own."""

    depth: int = Field(default=1, ge=1)  # 3×3 convolutions before the last


class FifthHead(Head):
    """Adds projections of latent, text and features on the latent's grid, then convolves."""

    name = "fifth"
    reads = frozenset({"latent", "text", "features"})

    def __init__(self, *, latent_channels, text_width, feature_channels, scale, depth):
        channels = {int(number): given for number, given in feature_channels.items()}
        super().__init__(
            {
                "latent_channels": latent_channels,
                "text_width": text_width,
                "feature_channels": channels,
                "scale": scale,
                "depth": depth,
            }
        )
        self.feature_channels, self.scale = channels, scale
        self.latent = nn.Conv2d(latent_channels, 8, 1)
        self.text = nn.Linear(text_width, 8)
        self.features = nn.ModuleDict({str(n): nn.Conv2d(c, 8, 1) for n, c in channels.items()})
        self.layers = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(depth))
        self.last = nn.Conv2d(8, 1, 1)

    @classmethod
    def from_layers(cls, inputs, ldm, options):
        """Build a head with fresh weights for these layers."""
        assert ldm.load is None, "its options ask for no weights"
        assert all(feature.draws > 0 for feature in inputs.features.values())
        return cls(
            latent_channels=inputs.latent_channels,
            text_width=inputs.text_width,
            feature_channels={n: feature.channels for n, feature in inputs.features.items()},
            scale=inputs.pixels_per_latent,
            depth=options.depth,
        )

    @property
    def last_layer(self):
        """The 1×1 convolution to one channel."""
        return self.last

    def forward(self, *, latent, text, features, text_pooled=None):
        """Return mask logits (B, 1, H, W)."""
        hidden = self.latent(latent) + self.text(text.mean(dim=1))[:, :, None, None]
        for number, project in self.features.items():
            feature = project(features[int(number)].to(self.dtype))
            hidden = hidden + F.interpolate(feature, size=latent.shape[2:])
        for layer in self.layers:
            hidden = layer(torch.relu(hidden))
        return F.interpolate(self.last(hidden), scale_factor=float(self.scale), mode="bilinear")
