"""LD-ZNet: ZNet that also attends to the LDM's features of the same image and phrase.

Shape suffixes: B batch, F a feature's channels, h/w its height and width.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from models.heads.attention_pool import AttentionPool2d
from models.heads.head import check_feature, is_positive, read_by_block
from models.heads.inputs import HeadInputs
from models.heads.options import PAPER_BLOCKS, LDZNetOptions
from models.heads.transformer import ConcatenationTransformer, FeatureTransformer, wrap_transformers
from models.heads.unet_head import UNetHead
from models.ldm.blocks import feature_shape, select_blocks
from models.ldm.unet_config import LATENT_DOWNSCALE


class LDZNet(UNetHead):
    """Segments from the clean latent, the text and the features of some blocks.

    Args:
        unet_config: config of the LDM's UNet (diffusers' UNet2DConditionModel).
        blocks: numbers of the blocks that read the feature of the same block.
        fusion: "attention" (the paper's: attention-pooled, cross-attended) or "concatenation"
            (its variant for comparison). Pools and added attentions start from N(0, 1 / inputs),
            biases at zero; the concatenation's convolution starts by ignoring the feature.
        size_px: image side that the pools' positional embeddings are learned for, a multiple of
            64; other sides resize them.
        feature_channels: block number (int, or its digits from JSON) to the channels of its
            feature, where these are not the block's own, as for features of another LDM.

    Raises:
        ValueError: an argument that the UNet does not allow.
    """

    name = "ldznet"
    reads = frozenset({"latent", "text", "features"})

    def __init__(
        self,
        *,
        unet_config: Mapping[str, Any],
        blocks: Sequence[int] = PAPER_BLOCKS,
        fusion: str = "attention",
        size_px: int = 384,
        feature_channels: Mapping[int, int] | Mapping[str, int] | None = None,
    ) -> None:
        numbers = _check_blocks(blocks)
        given = read_by_block(feature_channels or {}, key="feature_channels", where="LDZNet")
        _check_options(fusion, size_px, given, numbers)
        arguments = {"blocks": numbers, "fusion": fusion, "size_px": size_px}
        super().__init__(unet_config, {**arguments, "feature_channels": given or None})
        chosen = select_blocks(self.unet, numbers)
        self.blocks = {block.number: block for block in chosen}
        self.feature_channels = {b.number: given.get(b.number, b.channels) for b in chosen}
        self.pools = nn.ModuleDict()
        if fusion == "concatenation":
            wrap_transformers(self.unet, self.feature_channels, ConcatenationTransformer)
            return
        side = size_px // LATENT_DOWNSCALE
        for block in chosen:
            self.pools[str(block.number)] = AttentionPool2d(
                channels=self.feature_channels[block.number],
                grid=feature_shape(block, (side, side))[1:],
                num_heads=self.unet.get_submodule(block.module).num_attention_heads,
            )
        wrap_transformers(self.unet, self.feature_channels, FeatureTransformer)

    @classmethod
    def choose_arguments(cls, inputs: HeadInputs, options: LDZNetOptions) -> dict[str, Any]:
        """Return the constructor's arguments beside ``unet_config`` for a new head."""
        return {**options.model_dump(), "size_px": inputs.view_px}

    def forward(
        self,
        *,
        latent: Tensor,
        text: Tensor,
        features: Mapping[int, Tensor],
        text_pooled: Tensor | None = None,
    ) -> Tensor:
        """Return mask logits (B, 1, H, W); H and W are multiples of 64. Inputs are as of ``Head``.

        Blocks that the head does not read are ignored. A feature has the sides of its block at this
        latent, or, where its channels are not the block's own (another LDM's), the latent's aspect.

        Raises:
            ValueError: a shape is another one, or a block is missing.
        """
        self._check_shapes(latent, text)
        context: dict[int, Tensor] = {}
        for number in self.feature_channels:
            feature_BFhw = check_feature(
                features, number, channels=self.feature_channels, where="LDZNet", batch=len(latent)
            )
            self._check_sides(number, tuple(feature_BFhw.shape[2:]), tuple(latent.shape[2:]))
            pool = self.pools[str(number)] if self.pools else nn.Identity()
            context[number] = pool(feature_BFhw.to(self.dtype))
        return self.segment(latent, text, text_pooled, context)

    def _check_sides(self, number: int, sides: tuple[int, ...], latent: tuple[int, ...]) -> None:
        (h, w), (height, width) = sides, latent
        channels, *own = feature_shape(self.blocks[number], (height, width))
        if self.feature_channels[number] == channels:
            fits, wanted = sides == tuple(own), f"{own[0]}×{own[1]}"
        else:
            # Some factor divides the latent's sides to these, rounded up as downsamplers round.
            fits = height * (w - 1) < width * h and width * (h - 1) < height * w
            wanted = "sides of the same aspect"
        if not fits:
            raise ValueError(
                f"LDZNet: feature of block {number} must have {wanted} for a latent of "
                f"{height}×{width}, got {h}×{w}; take latent and features from the same view"
            )


def _check_blocks(blocks: object) -> list[int]:
    """Return block numbers in order, each once."""
    if (
        not isinstance(blocks, Collection)
        or isinstance(blocks, str | bytes | Mapping)
        or not all(is_positive(number) for number in blocks)
    ):
        raise ValueError(
            f"LDZNet: blocks must be a list of whole numbers, such as [6, 7], got {blocks!r}"
        )
    return sorted(set(blocks))


def _check_options(
    fusion: str, size_px: int, given: Mapping[int, int], numbers: Sequence[int]
) -> None:
    if fusion not in ("attention", "concatenation"):
        raise ValueError(f'LDZNet: fusion must be "attention" or "concatenation", got {fusion!r}')
    if not is_positive(size_px) or size_px % 64:
        raise ValueError(f"LDZNet: size_px must be a positive multiple of 64, got {size_px!r}")
    for number, channels in given.items():
        if not is_positive(channels):
            raise ValueError(
                f"LDZNet: feature_channels of block {number} must be a whole number above 0, "
                f"got {channels!r}"
            )
    if unknown := sorted(set(given) - set(numbers)):
        raise ValueError(
            f"LDZNet: feature_channels must name some of the head's blocks, got {unknown}"
        )
