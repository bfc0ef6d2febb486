"""Attention pooling of a feature that returns all tokens, not their mean's alone.

CLIP's AttentionPool2d (https://github.com/openai/CLIP) in the form of guided-diffusion and of
LD-ZNet's checkpoint, whose parameter names it keeps.

Shape suffixes: B batch, C channels, h/w a feature's height and width, N tokens (h·w + 1),
K heads, D channels a head.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def init_new_parameters(module: nn.Module, *, std: float | None = None) -> None:
    """Draw the weights of all linear and convolution layers in ``module`` from N(0, std²).

    Without ``std`` it is 1 / sqrt(inputs) of each layer, as in CLIP's own attention pool: 0.028 at
    SD's 1280 channels. The paper says "a normal distribution" and no more. A fixed 0.02 at 96
    channels would shrink what passes the four new layers of a block to a thousandth, and LD-ZNet
    would stay a ZNet for hundreds of steps. Biases become zero, norms keep their start.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(layer.weight, std=std or layer.weight[0].numel() ** -0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class AttentionPool2d(nn.Module):
    """Self-attention over a feature's tokens and their mean; all output tokens are returned.

    Args:
        channels: C of the feature, a multiple of ``num_heads``.
        grid: (h, w) that the positional embedding is learned for; other sides resize it.
        num_heads: attention heads (SD 1.4: 8 of 160 channels).

    Raises:
        ValueError: ``channels`` is not a multiple of ``num_heads``.
    """

    def __init__(self, *, channels: int, grid: tuple[int, int], num_heads: int) -> None:
        super().__init__()
        if channels % num_heads:
            raise ValueError(
                f"AttentionPool2d: channels must be a multiple of num_heads {num_heads}, "
                f"got {channels}"
            )
        self.channels = channels
        self.grid = grid
        self.num_heads = num_heads
        num_tokens = grid[0] * grid[1] + 1
        self.positional_embedding = nn.Parameter(torch.randn(channels, num_tokens) / channels**0.5)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, channels, 1)
        init_new_parameters(self)

    def forward(self, feature_BChw: Tensor) -> Tensor:
        """Pool a feature (B, C, h, w) to tokens (B, h·w + 1, C), the mean's first.

        The published code scales q and k by D^-1/4 each and computes the softmax in float32, which
        torch's scaled_dot_product_attention does too, within rounding.

        Raises:
            ValueError: not (B, C, h, w) with this C.
        """
        if feature_BChw.ndim != 4 or feature_BChw.shape[1] != self.channels:
            raise ValueError(
                f"AttentionPool2d: feature must be (B, {self.channels}, h, w), "
                f"got {tuple(feature_BChw.shape)}"
            )
        batch, _, height, width = feature_BChw.shape
        tokens_BCN = feature_BChw.flatten(2)
        tokens_BCN = torch.cat([tokens_BCN.mean(dim=-1, keepdim=True), tokens_BCN], dim=-1)
        tokens_BCN = tokens_BCN + self._position(height, width).to(tokens_BCN.dtype)
        # Split into q, k, v along channels first, then each into heads.
        qkv = self.qkv_proj(tokens_BCN).unflatten(1, (3, self.num_heads, -1)).transpose(-1, -2)
        q_BKND, k_BKND, v_BKND = qkv.unbind(1)
        pooled_BKND = F.scaled_dot_product_attention(q_BKND, k_BKND, v_BKND)
        pooled_BCN = pooled_BKND.transpose(-1, -2).reshape(batch, self.channels, -1)
        return self.c_proj(pooled_BCN).transpose(1, 2)

    def _position(self, height: int, width: int) -> Tensor:
        """Return the positional embedding (C, N) for this grid: bicubic, the mean's entry apart."""
        if (height, width) == self.grid:
            return self.positional_embedding
        mean_C1, rest_CN = self.positional_embedding.split([1, self.grid[0] * self.grid[1]], dim=1)
        rest = F.interpolate(
            rest_CN.unflatten(1, self.grid)[None],
            size=(height, width),
            mode="bicubic",
            align_corners=False,
        )
        return torch.cat([mean_C1, rest[0].flatten(1)], dim=1)
