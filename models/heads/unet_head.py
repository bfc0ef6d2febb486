"""The network that RGBNet, ZNet and LD-ZNet share: the LDM's UNet with one output channel.

Shape suffixes: B batch, C latent channels, h/w latent height and width, T text tokens, D text
width, P width of the pooled text.
"""

from collections.abc import Mapping
from typing import Any, Self

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F

from models.heads.attention_pool import init_new_parameters
from models.heads.head import Head
from models.heads.inputs import HeadInputs, LDMNetwork
from models.ldm.blocks import build_added_conditions
from models.ldm.unet_config import LATENT_DOWNSCALE, read_text_width

FINAL_STD = 0.02  # spread of ``final``'s weights around where they start
SILU_UNIT_POINT = 1.2784645427610738  # silu is 1 here and so is its slope: root of x·sigmoid(x) = 1
# diffusers checks few of a config's values; torch then fails in its own ways.
_BAD_CONFIG = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError),
    *(RuntimeError, TypeError, ValueError),
)


class UNetHead(Head):
    """A head whose network is the LDM's UNet at timestep 0, then layers up to the image's size.

    Args:
        unet_config: config of the LDM's UNet (diffusers' UNet2DConditionModel).
        arguments: the subclass's own constructor arguments, for ``config``.

    Raises:
        ValueError: diffusers builds no UNet from the config, or it reads texts of several widths.
    """

    def __init__(self, unet_config: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
        where = type(self).__name__
        if not isinstance(unet_config, Mapping) or not unet_config:
            raise ValueError(
                f"{where}: unet_config must be the config of a UNet2DConditionModel, got "
                f"{unet_config!r}"
            )
        # Keys with an underscore are diffusers' notes, one of them a local path.
        kept = {key: value for key, value in unet_config.items() if not key.startswith("_")}
        super().__init__({"unet_config": kept, **arguments})
        try:
            self.unet = UNet2DConditionModel.from_config(kept)
        except _BAD_CONFIG as error:
            raise ValueError(
                f"{where}: unet_config must be one that diffusers builds a UNet2DConditionModel "
                f"from, got {type(error).__name__}: {error}"
            ) from error
        read_text_width(self.unet.config)
        last = self.unet.conv_out
        self.unet.conv_out = nn.Conv2d(
            last.in_channels, 1, kernel_size=last.kernel_size, padding=last.padding
        )
        self.final = build_final()

    @classmethod
    def from_layers(cls, inputs: HeadInputs, ldm: LDMNetwork, options: Any) -> Self:
        """Build the head from the LDM's UNet, or with fresh weights if it is not to be read."""
        arguments = cls.choose_arguments(inputs, options)
        if ldm.load is None:
            return cls(unet_config=ldm.config, **arguments)
        unet = ldm.load()
        assert isinstance(unet, UNet2DConditionModel)
        return cls.from_ldm(unet, **arguments)

    @classmethod
    def choose_arguments(cls, inputs: HeadInputs, options: Any) -> dict[str, Any]:
        """Return the constructor's arguments beside ``unet_config`` for a new head."""
        return {}

    @classmethod
    def from_ldm(cls, unet: UNet2DConditionModel, **arguments: Any) -> Self:
        """Build the head from a copy of the LDM's UNet; ``arguments`` are the constructor's others.

        The last convolution is that of output channel 0, weight and bias. New parameters start as
        ``build_final``, ``init_new_parameters`` and the class's docstring say.
        """
        head = cls(unet_config=dict(unet.config), **arguments)
        weights = dict(unet.state_dict())
        for name in ("conv_out.weight", "conv_out.bias"):
            weights[name] = weights[name][:1]
        missing, unexpected = head.unet.load_state_dict(weights, strict=False)
        new = ("attn3.", "norm_sd.", "merge.")
        assert not unexpected
        assert all(any(part in name for part in new) for name in missing)
        return head

    @property
    def last_layer(self) -> nn.Conv2d:
        """``final``'s last convolution; the stack starts at logits about 0."""
        last = self.final[-1]
        assert isinstance(last, nn.Conv2d)
        return last

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the UNet's blocks in the backward pass: less memory, about 1.3× the time."""
        self.unet.enable_gradient_checkpointing()

    def segment(
        self,
        latent_BChw: Tensor,
        text_BTD: Tensor,
        pooled_BP: Tensor | None,
        block_context: dict[int, Tensor] | None = None,
    ) -> Tensor:
        """Run the UNet and ``final`` on a scaled latent and a prompt's embedding: (B, 1, 8h, 8w).

        ``pooled_BP`` is read where the LDM's UNet takes added conditions (SDXL), and only there.
        ``block_context`` is what the blocks of an LD-ZNet attend to or concatenate, by number.

        Raises:
            ValueError: a shape that the UNet does not take, or pooled text that it needs is None.
        """
        self._check_shapes(latent_BChw, text_BTD)
        pooled = None if pooled_BP is None else pooled_BP.to(self.dtype)
        timestep_B = torch.zeros(len(latent_BChw), dtype=torch.long, device=latent_BChw.device)
        (hidden,) = self.unet(
            latent_BChw.to(self.dtype),
            timestep_B,
            encoder_hidden_states=text_BTD.to(self.dtype),
            added_cond_kwargs=build_added_conditions(self.unet.config, pooled, latent_BChw),
            cross_attention_kwargs={"block_context": block_context} if block_context else None,
            return_dict=False,
        )
        return self.final(F.silu(hidden))

    def _check_shapes(self, latent_BChw: Tensor, text_BTD: Tensor) -> None:
        config, where = self.unet.config, type(self).__name__
        step = 2 ** (len(config.block_out_channels) - 1)
        shape = tuple(latent_BChw.shape)
        if len(shape) != 4 or shape[1] != config.in_channels:
            raise ValueError(
                f"{where}: latent must be (B, {config.in_channels}, h, w), got {shape}"
            )
        if shape[0] == 0:
            raise ValueError(
                f"{where}: latent must have at least one row, got {shape}; skip empty batches"
            )
        if shape[2] % step or shape[3] % step or 0 in shape:
            raise ValueError(
                f"{where}: latent sides must be multiples of {step} (image sides of "
                f"{step * LATENT_DOWNSCALE} px), got {shape[2]}×{shape[3]}; crop or resize the view"
            )
        text, width = tuple(text_BTD.shape), read_text_width(config)
        if len(text) != 3 or text[0] != shape[0] or text[2] != width:
            raise ValueError(f"{where}: text must be ({shape[0]}, tokens, {width}), got {text}")


@torch.no_grad()
def build_final() -> nn.Sequential:
    """Build the layers from latent to image size: (B, 1, h, w) to (B, 1, 8h, 8w), 55 parameters.

    Weights start from N(0, 0.02²) around the 3×3 and 2×2 kernels of nearest-neighbour upsampling,
    biases so that each SiLU works where its value and its slope are 1: at first the stack passes
    its input on, to first order unchanged. With torch's own start, which the published code leaves,
    seven SiLU shrink the signal: the gradient that reaches the UNet is 1e-7 of this one, and a
    small UNet of random weights does not fit even one batch. N(0, 0.02²) alone leaves 1e-14, and
    N(0, 1) does not fit it either.
    """
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [nn.Conv2d(1, 1, 3, padding=1), nn.SiLU()]
        layers += [nn.ConvTranspose2d(1, 1, 2, stride=2), nn.SiLU()]
    layers.append(nn.Conv2d(1, 1, 3, padding=1))
    final = nn.Sequential(*layers)
    init_new_parameters(final, std=FINAL_STD)
    # A SiLU's output is 1 too high, and the next SiLU's input must be SILU_UNIT_POINT too high.
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
    return final
