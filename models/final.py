"""``final``: the layers that bring a head's one channel from the latent's size to the image's.

Shape suffixes: B batch, h/w latent height and width.
"""

import torch
from torch import nn

from models.attention_pool import init_new_parameters

FINAL_STD = 0.02
"""Spread of ``final``'s weights around where they start."""

SILU_UNIT_POINT = 1.2784645427610738
"""Where silu(x) = 1 and silu'(x) = 1 (the root of x·sigmoid(x) = 1)."""


def build_final() -> nn.Sequential:
    """Build the layers from latent to image size: (B, 1, h, w) to (B, 1, 8h, 8w), 55 parameters.

    Weights start from N(0, 0.02²) around the 3×3 and 2×2 kernels of nearest-neighbour upsampling,
    biases so that each SiLU works where its value and its slope are 1: at first the stack passes
    its input on, to first order unchanged. Why: seven SiLU with torch's own start, which the
    published code leaves, shrink the signal at each; the gradient that reaches the UNet is 1e-7
    of this one, and a small UNet of random weights does not fit even one batch. N(0, 0.02²) alone
    leaves 1e-14, N(0, 1) does not fit it either.
    """
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [nn.Conv2d(1, 1, 3, padding=1), nn.SiLU()]
        layers += [nn.ConvTranspose2d(1, 1, 2, stride=2), nn.SiLU()]
    layers.append(nn.Conv2d(1, 1, 3, padding=1))
    final = nn.Sequential(*layers)
    init_new_parameters(final, std=FINAL_STD)
    _add_identity(final)
    return final


@torch.no_grad()
def _add_identity(final: nn.Sequential) -> None:
    """Move ``final`` to the start that ``build_final`` describes.

    What leaves a SiLU is 1 too high and wants to be SILU_UNIT_POINT too high at the next.
    """
    last = f"{len(final) - 1}.bias"
    for name, parameter in final.named_parameters():
        if name == "0.bias":
            parameter.add_(SILU_UNIT_POINT)
        elif name == last:
            parameter.sub_(1.0)
        elif name.endswith("bias"):
            parameter.add_(SILU_UNIT_POINT - 1.0)
        elif parameter.shape[-1] == 3:
            parameter[..., 1, 1].add_(1.0)
        else:
            parameter.add_(1.0)
