"""ProbeHead: a small decoder on frozen features alone, which measures what a block holds.

Shape suffixes: B batch, C a feature's channels, h/w its height and width, W the probe's width,
H/W image height and width.
"""

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.heads.head import Head, check_feature, is_positive, read_by_block
from models.heads.inputs import HeadInputs, LDMNetwork
from models.heads.options import ProbeOptions
from models.ldm.unet_config import LATENT_DOWNSCALE

LAST_STD = 1e-3  # of the last convolution's weights at the start: logits about 0, gradients not


class ProbeHead(Head):
    """Segments from the features of some blocks, without latent, image or text.

    LD-ZNet's figure 4 scores each block and timestep by "a simple decoder" that is not published.
    Here: each feature is normalised as a whole (blocks and timesteps differ in scale, which is not
    what is asked), brought to ``width`` channels by a 1×1 convolution and to the largest grid
    among the blocks bilinearly; their sum passes SiLU, a 3×3 convolution, SiLU and a 1×1 to one
    channel, which is resized to the image. At SD 1.4 and blocks 6-10 that is 214,241 parameters
    and 0.05 GFLOP a pair at 384 px, for 1.57 MB of float16 read: less than a millisecond of a
    GPU, so that reading is what an epoch costs. The features are conditioned on the phrase by the
    LDM (``condition: phrase``); the probe itself sees no text.

    Args:
        blocks: block number (int, or its digits from JSON) to (channels, downscale) of its
            feature; downscale is the latent's side over the feature's.
        width: W, channels of the decoder.
        grid: features are averaged to at most so many positions a side, so that blocks of
            different resolution are asked the same; None: as they are.

    Raises:
        ValueError: no block, a width, grid, channels or a downscale below 1, or a key that is no
            block.
    """

    name = "probe"
    reads = frozenset({"features"})

    def __init__(
        self,
        *,
        blocks: Mapping[int, Sequence[int]] | Mapping[str, Sequence[int]],
        width: int = 32,
        grid: int | None = None,
    ) -> None:
        given = _read_blocks(blocks)
        arguments = {"blocks": given, "width": width}
        super().__init__(arguments if grid is None else arguments | {"grid": grid})
        if grid is not None and not is_positive(grid):
            raise ValueError(f"ProbeHead: grid must be positive or None, got {grid!r}")
        if not given or not is_positive(width):
            raise ValueError(
                f"ProbeHead: blocks must name at least one and width be positive, got blocks "
                f"{list(given)} and width {width!r}"
            )
        self.grid = grid
        self.feature_channels = {number: channels for number, (channels, _) in given.items()}
        self.downscales = {number: downscale for number, (_, downscale) in given.items()}
        self.reduce = nn.ModuleDict(
            {str(n): nn.Conv2d(c, width, 1) for n, c in self.feature_channels.items()}
        )
        self.mix = nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Conv2d(width, 1, 1)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name == "last.weight":
                nn.init.normal_(parameter, std=LAST_STD)
            else:
                nn.init.kaiming_normal_(parameter, nonlinearity="relu")

    @classmethod
    def from_layers(cls, inputs: HeadInputs, ldm: LDMNetwork, options: ProbeOptions) -> Self:
        """Build a probe for the features; it has no layer of the LDM, so it takes no weights."""
        blocks = {
            number: (feature.channels, inputs.latent_side // feature.height)
            for number, feature in inputs.features.items()
        }
        return cls(blocks=blocks, width=options.width, grid=options.grid)

    @property
    def last_layer(self) -> nn.Conv2d:
        """The 1×1 convolution to one channel."""
        return self.last

    def forward(self, *, features: Mapping[int, Tensor]) -> Tensor:
        """Return mask logits (B, 1, H, W).

        Args:
            features: block number to the feature of one draw (B, channels, h, w) float; blocks
                that the head does not read are ignored. H = 8 · downscale · h, for the image
                sides that heads take, multiples of 64.

        Raises:
            ValueError: a shape is another one, a block is missing, or the blocks' batches or views
                differ.
        """
        self._check_agreement(features)
        reduced = [self._reduce(features, number) for number in self.feature_channels]
        largest = max((x.shape[-2:] for x in reduced), key=lambda size: size[0] * size[1])
        hidden_BWhw = torch.stack([_resize(x, largest) for x in reduced]).sum(dim=0)
        logits_B1hw = self.last(F.silu(self.mix(F.silu(hidden_BWhw))))
        first, downscale = next(iter(self.downscales.items()))
        height, width = features[first].shape[-2:]
        scale = LATENT_DOWNSCALE * downscale
        return _resize(logits_B1hw, (scale * height, scale * width))

    def _check_agreement(self, features: Mapping[int, Tensor]) -> None:
        """Check each feature, and that all have as many rows and belong to one latent's size."""
        found: dict[int, tuple[int, int, int]] = {}
        for number, scale in self.downscales.items():
            shape = check_feature(
                features, number, channels=self.feature_channels, where="ProbeHead"
            ).shape
            found[number] = (shape[0], scale * shape[2], scale * shape[3])
        if len(set(found.values())) > 1:
            raise ValueError(
                "ProbeHead: features must be of one batch and one latent size, got (rows, latent "
                f"height, latent width) {found} by block; take them from the same rows of one layer"
            )

    def _reduce(self, features: Mapping[int, Tensor], number: int) -> Tensor:
        normal_BChw = F.group_norm(features[number].to(self.dtype), num_groups=1)
        if self.grid is not None:
            height, width = normal_BChw.shape[-2:]
            sides = (min(height, self.grid), min(width, self.grid))
            normal_BChw = F.adaptive_avg_pool2d(normal_BChw, sides)
        return self.reduce[str(number)](normal_BChw)


def _read_blocks(blocks: object) -> dict[int, tuple[int, int]]:
    """Return channels and downscale by block number, in the blocks' order."""
    given = read_by_block(blocks, key="blocks", where="ProbeHead")
    for number, pair in given.items():
        fits = isinstance(pair, Sequence) and len(pair) == 2 and all(map(is_positive, pair))
        if not fits:
            raise ValueError(
                f"ProbeHead: blocks must map block {number} to its channels and downscale, both "
                f"above 0, got {pair!r}"
            )
    return {number: (channels, scale) for number, (channels, scale) in sorted(given.items())}


def _resize(x_BChw: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(x_BChw.shape[-2:]) == tuple(size):
        return x_BChw
    return F.interpolate(x_BChw, size=tuple(size), mode="bilinear", align_corners=False)
