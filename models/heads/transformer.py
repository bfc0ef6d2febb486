"""Spatial transformers that read a feature, put into a diffusers UNet in place of its own.

A feature is an argument of the UNet's call (``cross_attention_kwargs["block_context"][number]``),
not state of a module: a block that is recomputed for gradient checkpointing sees the same one.
Transformers without a feature are replaced too, since diffusers' attention warns about kwargs that
it does not know. All keep the modules of the transformer they replace under diffusers' names.

Shape suffixes: B batch, C channels, F the feature's channels, h/w a block's height and width,
N image tokens (h·w), T text tokens, D text width, P context tokens.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from models.heads.attention_pool import init_new_parameters
from models.ldm.blocks import list_blocks

ATTENTION_OUT_STD = 0.02  # spread of the added attention's output weights at the start
Context = Mapping[int, Tensor]  # by block number


class PlainTransformer(nn.Module):
    """A UNet's transformer that computes what diffusers' own does and reads no feature.

    Its projections are convolutions (SD 1.x) or linear layers (SD 2.x).

    Args:
        transformer: the UNet's own; its modules are used in place, not copied.
        number: the block's number, its key in ``block_context``.
    """

    def __init__(self, transformer: Transformer2DModel, *, number: int) -> None:
        super().__init__()
        self.number = number
        assert transformer.is_input_continuous, "a UNet's transformers take images, not tokens"
        self.use_linear_projection = bool(transformer.use_linear_projection)
        # diffusers' enable_gradient_checkpointing sets both on every module that has the flag.
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Any = None
        self.norm = transformer.norm
        self.proj_in = transformer.proj_in
        self.transformer_blocks = transformer.transformer_blocks
        self.proj_out = transformer.proj_out

    def forward(
        self,
        hidden_states: Tensor,
        *,
        encoder_hidden_states: Tensor | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """Map (B, C, h, w) to (B, C, h, w), in a tuple, called as a UNet's blocks do.

        ``encoder_hidden_states`` is the text (B, T, D); the masks are biases on the attention
        scores, as the UNet makes them.
        """
        assert not return_dict, "a UNet's blocks call their transformers with return_dict=False"
        context = (cross_attention_kwargs or {}).get("block_context", {})
        hidden_BChw, *more = self.join_feature(hidden_states, context)
        inputs = (attention_mask, encoder_hidden_states, encoder_attention_mask, *more)
        hidden_BNC = self._project_in(hidden_BChw)
        for block in self.transformer_blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden_BNC = self._gradient_checkpointing_func(block, hidden_BNC, *inputs)
            else:
                hidden_BNC = block(hidden_BNC, *inputs)
        return (self._project_out(hidden_BNC, hidden_BChw.shape) + hidden_BChw,)

    def join_feature(self, hidden_BChw: Tensor, context: Context) -> tuple[Tensor, ...]:
        """Return the hidden state to transform, and further inputs of the blocks: none here."""
        return (hidden_BChw,)

    def _project_in(self, hidden_BChw: Tensor) -> Tensor:
        hidden = self.norm(hidden_BChw)
        if self.use_linear_projection:
            return self.proj_in(hidden.flatten(2).transpose(1, 2))
        return self.proj_in(hidden).flatten(2).transpose(1, 2)

    def _project_out(self, hidden_BNC: Tensor, shape: torch.Size) -> Tensor:
        if self.use_linear_projection:
            hidden_BNC = self.proj_out(hidden_BNC)
        hidden = hidden_BNC.transpose(1, 2).unflatten(2, shape[2:]).contiguous()
        return hidden if self.use_linear_projection else self.proj_out(hidden)


class FeatureBlock(nn.Module):
    """A basic transformer block with one more attention, between text and feed-forward.

    Each with a residual, in this order: self-attention (norm1), text cross-attention (norm2),
    cross-attention to the context (norm_sd, ``attn3``), feed-forward (norm3). The added attention
    has q, k, v without bias and an output with one. Names as in the published checkpoint.

    Raises:
        ValueError: the block is of another kind than Stable Diffusion's.
    """

    def __init__(self, block: BasicTransformerBlock, *, context_channels: int) -> None:
        super().__init__()
        if block.norm_type != "layer_norm" or block.attn2 is None or block.only_cross_attention:
            raise ValueError(
                "FeatureBlock: expected Stable Diffusion's transformer block (norm_type "
                f"layer_norm, self- and text attention), got norm_type {block.norm_type}, "
                f"attn2 {type(block.attn2).__name__}, only_cross_attention "
                f"{block.only_cross_attention}; such a UNet can be a ZNet, not an LD-ZNet"
            )
        self.norm1, self.attn1 = block.norm1, block.attn1
        self.norm2, self.attn2 = block.norm2, block.attn2
        self.norm_sd = nn.LayerNorm(block.dim)
        self.attn3 = Attention(
            query_dim=block.dim,
            cross_attention_dim=context_channels,
            heads=block.num_attention_heads,
            dim_head=block.attention_head_dim,
            bias=False,
            out_bias=True,
        )
        self.norm3, self.ff = block.norm3, block.ff
        init_new_parameters(self.attn3)
        # Small at narrow widths too: the block starts nearly as ZNet's and takes in of the feature
        # what lowers the loss, instead of first unlearning a random projection of it.
        init_new_parameters(self.attn3.to_out, std=ATTENTION_OUT_STD)

    def forward(
        self,
        hidden_BNC: Tensor,
        attention_mask: Tensor | None,
        text_BTD: Tensor | None,
        text_mask: Tensor | None,
        context_BPF: Tensor,
    ) -> Tensor:
        """Return (B, N, C); the order of arguments is BasicTransformerBlock's, then the context."""
        hidden_BNC = hidden_BNC + self.attn1(self.norm1(hidden_BNC), attention_mask=attention_mask)
        hidden_BNC = hidden_BNC + self.attn2(
            self.norm2(hidden_BNC), encoder_hidden_states=text_BTD, attention_mask=text_mask
        )
        hidden_BNC = hidden_BNC + self.attn3(
            self.norm_sd(hidden_BNC), encoder_hidden_states=context_BPF
        )
        return hidden_BNC + self.ff(self.norm3(hidden_BNC))


class FeatureTransformer(PlainTransformer):
    """A UNet's transformer whose blocks attend to a context as well.

    ``feature_channels`` are those of the context's tokens; other arguments as PlainTransformer's.
    """

    def __init__(
        self, transformer: Transformer2DModel, *, feature_channels: int, number: int
    ) -> None:
        super().__init__(transformer, number=number)
        self.transformer_blocks = nn.ModuleList(
            FeatureBlock(block, context_channels=feature_channels)
            for block in transformer.transformer_blocks
        )

    def join_feature(self, hidden_BChw: Tensor, context: Context) -> tuple[Tensor, ...]:
        """Return the hidden state, and the context (B, P, F) that the blocks attend to."""
        return hidden_BChw, context[self.number]


class ConcatenationTransformer(PlainTransformer):
    """The paper's variant for comparison: the feature joins the transformer's input.

    It is concatenated along channels and a 1×1 convolution brings C + F channels back to C. That
    starts as the identity on the hidden state and zero on the feature: the network starts as ZNet
    exactly, and the gradient still reaches every weight. Arguments as FeatureTransformer's.
    """

    def __init__(
        self, transformer: Transformer2DModel, *, feature_channels: int, number: int
    ) -> None:
        super().__init__(transformer, number=number)
        channels = transformer.in_channels
        self.merge = nn.Conv2d(channels + feature_channels, channels, 1)
        with torch.no_grad():
            for parameter in self.merge.parameters():
                parameter.zero_()
            self.merge.weight[:, :channels, 0, 0].fill_diagonal_(1.0)

    def join_feature(self, hidden_BChw: Tensor, context: Context) -> tuple[Tensor, ...]:
        """Return the hidden state merged with the feature (B, F, h, w).

        Raises:
            ValueError: the feature is of another height or width than the hidden state.
        """
        feature_BFhw = context[self.number]
        if feature_BFhw.shape[2:] != hidden_BChw.shape[2:]:
            raise ValueError(
                f"feature of block {self.number}: concatenation needs the block's own sides "
                f"{tuple(hidden_BChw.shape[2:])}, got {tuple(feature_BFhw.shape[2:])}; take "
                'features at the latent\'s size, or use fusion "attention"'
            )
        return (self.merge(torch.cat([hidden_BChw, feature_BFhw], dim=1)),)


def wrap_transformers(
    unet: UNet2DConditionModel,
    feature_channels: Mapping[int, int],
    wrapper: type[FeatureTransformer] | type[ConcatenationTransformer],
) -> None:
    """Replace the UNet's transformers: ``wrapper`` at the blocks given, else PlainTransformer.

    ``feature_channels`` maps a block's number to the channels of its feature. The UNet then needs
    ``cross_attention_kwargs={"block_context": {number: tensor}}`` in its call.
    """
    for block in list_blocks(unet):
        transformer = unet.get_submodule(block.module)
        wrapped = PlainTransformer(transformer, number=block.number)
        if channels := feature_channels.get(block.number):
            wrapped = wrapper(transformer, feature_channels=channels, number=block.number)
        stage, _, position = block.module.rpartition(".")
        unet.get_submodule(stage)[int(position)] = wrapped
