"""ZNet, and what it shares with the other heads: their base classes.

``Head`` is what training and evaluation see of any head: named inputs, a JSON-safe config, a folder
to save to. ``UNetHead`` is the network that RGBNet, ZNet and LD-ZNet share: the LDM's UNet with one
output channel, SiLU, then ``final``, which brings it from the latent's size to the image's.

Shape suffixes: B batch, C latent channels, h/w latent height and width, H/W image height and width
(8h, 8w), T text tokens, D text width.
"""

import inspect
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention_pool import init_new_parameters

IMAGE_SCALE = 8
"""Image side over latent side: the VAE's factor, and the upsampling of ``final``."""

FINAL_STD = 0.02
"""Spread of ``final``'s weights around where they start."""

SILU_UNIT_POINT = 1.2784645427610738
"""Where silu(x) = 1 and silu'(x) = 1 (the root of x·sigmoid(x) = 1)."""


class Head(nn.Module):
    """A network from what a store holds to mask logits (B, 1, H, W).

    ``inputs`` names the keyword arguments of ``forward``, some of latent, image, text, features:
    call ``head(**{name: batch[name] for name in head.inputs})``.
    """

    name: ClassVar[str]
    inputs: ClassVar[frozenset[str]]

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__()
        # Through JSON, so that tuples and int keys are the same before and after saving.
        self._options = json.dumps(options)

    @property
    def config(self) -> dict[str, Any]:
        """JSON-safe: the head's name under "head", and the arguments of its constructor."""
        return {"head": self.name, **json.loads(self._options)}

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype; inputs are cast to it."""
        return next(self.parameters()).dtype

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build a head with fresh weights from what ``config`` returned.

        Raises:
            ValueError: the config is another head's, or holds an unknown key.
        """
        options = dict(config)
        name = options.pop("head", None)
        if name != cls.name:
            raise ValueError(
                f'{cls.__name__}: config key "head" must be {cls.name!r}, got {name!r}'
            )
        known = [key for key in inspect.signature(cls).parameters if key != "self"]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ValueError(f"{cls.__name__}: config keys must be some of {known}, got {unknown}")
        return cls(**options)

    def save_pretrained(self, folder: Path | str) -> None:
        """Write ``model.safetensors``, then ``config.json``, into ``folder``, made if need be.

        Each is written beside its place and renamed, so a reader sees a whole file or none.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        temporary = folder / f".saving-{os.getpid()}"
        save_file(weights, temporary)
        temporary.replace(folder / "model.safetensors")
        temporary.write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")
        temporary.replace(folder / "config.json")

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> Self:
        """Read a head of this class from ``folder``, on the CPU, in the dtype it was saved in.

        Raises:
            ValueError: no saved head, another class's, or weights that do not fit the config.
        """
        folder = Path(folder)
        config = read_config(folder)
        with torch.device("meta"):  # no memory or time for weights that are replaced
            head = cls.from_config(config)
        try:
            head.load_state_dict(load_file(folder / "model.safetensors"), assign=True)
        except (SafetensorError, RuntimeError, FileNotFoundError) as error:
            raise ValueError(
                f"{folder / 'model.safetensors'}: expected the weights that config.json "
                f"describes, got: {error}"
            ) from error
        return head


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``folder/config.json`` of a saved head.

    Raises:
        ValueError: it is missing, no JSON, or no object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{path}: expected the config of a saved head, got no file")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON and UTF-8 errors
        raise ValueError(f"{path}: expected JSON, got: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(config).__name__}")
    return config


class UNetHead(Head):
    """A head whose torso is the LDM's UNet at timestep 0.

    Args:
        unet_config: config of the LDM's UNet (diffusers' UNet2DConditionModel).
        options: the subclass's own constructor arguments, for ``config``.
    """

    def __init__(self, *, unet_config: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        # Keys with an underscore are diffusers' notes, one of them a local path.
        kept = {key: value for key, value in unet_config.items() if not key.startswith("_")}
        super().__init__({"unet_config": kept, **options})
        self.unet = UNet2DConditionModel.from_config(kept)
        last = self.unet.conv_out
        self.unet.conv_out = nn.Conv2d(
            last.in_channels, 1, kernel_size=last.kernel_size, padding=last.padding
        )
        self.final = build_final()

    @classmethod
    def from_ldm(cls, unet: UNet2DConditionModel, **options: Any) -> Self:
        """Build the head from a copy of the LDM's UNet; ``options`` are the constructor's others.

        The last convolution is that of output channel 0, weight and bias. New parameters start as
        ``build_final``, ``init_new_parameters`` and the class's docstring say.
        """
        head = cls(unet_config=dict(unet.config), **options)
        weights = dict(unet.state_dict())
        for name in ("conv_out.weight", "conv_out.bias"):
            weights[name] = weights[name][:1]
        missing, unexpected = head.unet.load_state_dict(weights, strict=False)
        new = ("attn3.", "norm_sd.", "merge.")
        assert not unexpected
        assert all(any(part in name for part in new) for name in missing)
        return head

    @torch.no_grad()
    def start_at_prior(self, share: float) -> None:
        """Let a new head predict ``share``, the training masks' mean area, everywhere at first.

        Moves the bias of the last convolution, where ``final`` starts at logits about 0, by
        logit(share) (Lin et al. 2017, "Focal loss", section 4.1). Adam moves a bias by at most one
        learning rate a step, so from 0 a bias needs thousands of steps to say what is mostly
        background, and the rest of the network learns little before.

        Raises:
            ValueError: ``share`` is not inside (0, 1).
        """
        if not 0.0 < share < 1.0:
            raise ValueError(f"{type(self).__name__}: share must be inside (0, 1), got {share}")
        last = self.final[-1]
        assert isinstance(last, nn.Conv2d)
        assert last.bias is not None
        last.bias.add_(math.log(share / (1.0 - share)))

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the UNet's blocks in the backward pass: less memory, about 1.3× the time."""
        self.unet.enable_gradient_checkpointing()

    def segment(
        self, latent_BChw: Tensor, text_BTD: Tensor, block_context: dict[int, Tensor] | None = None
    ) -> Tensor:
        """Run torso and ``final`` on a scaled latent and a prompt's embedding: (B, 1, 8h, 8w).

        Raises:
            ValueError: a shape that the UNet does not take.
        """
        self._check_shapes(latent_BChw, text_BTD)
        kwargs = None if block_context is None else {"block_context": block_context}
        timestep_B = torch.zeros(len(latent_BChw), dtype=torch.long, device=latent_BChw.device)
        (hidden,) = self.unet(
            latent_BChw.to(self.dtype),
            timestep_B,
            encoder_hidden_states=text_BTD.to(self.dtype),
            cross_attention_kwargs=kwargs,
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
        if shape[2] % step or shape[3] % step or 0 in shape:
            raise ValueError(
                f"{where}: latent sides must be multiples of {step} (image sides of "
                f"{step * IMAGE_SCALE} px), got {shape[2]}×{shape[3]}; crop or resize the view"
            )
        text, width = tuple(text_BTD.shape), config.cross_attention_dim
        if len(text) != 3 or text[0] != shape[0] or text[2] != width:
            raise ValueError(f"{where}: text must be ({shape[0]}, tokens, {width}), got {text}")


class ZNet(UNetHead):
    """Segments from the clean latent and the text alone.

    Args:
        unet_config: config of the LDM's UNet (diffusers' UNet2DConditionModel).
    """

    name = "znet"
    inputs = frozenset({"latent", "text"})

    def __init__(self, *, unet_config: Mapping[str, Any]) -> None:
        super().__init__(unet_config=unet_config, options={})

    def forward(self, *, latent: Tensor, text: Tensor) -> Tensor:
        """Return mask logits (B, 1, H, W).

        Args:
            latent: (B, 4, H/8, W/8) float, clean and scaled; H and W multiples of 64.
            text: (B, tokens, width) float, the prompt's embedding.

        Raises:
            ValueError: a shape is another one.
        """
        return self.segment(latent, text)


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
