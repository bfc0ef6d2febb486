"""The interface of every head: a network from what a store holds to mask logits.

A head of your own is one file with two classes and a line in ``models.heads.registry.HEADS`` that
names them. Training, sweeps, evaluation and segmentation ask these two and know no head by name:

- its options, a ``HeadOptions``: what ``head:`` in a config may say of it, which blocks it reads
  and what a table shows of it. Their file should not import torch: configs are checked faster.
- the head, a ``Head``: see there for what it must define.

``tests/support/fifth_head.py`` is one.
"""

import inspect
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.heads.inputs import HeadInputs, LDMNetwork
from models.heads.options import read_config


class Head(nn.Module):
    """Base class of heads. A subclass defines what is listed here, and ``forward``.

    ``forward`` takes what ``reads`` names as keyword arguments and returns the logits (B, 1, H, W)
    of H×W images: call ``head(**{name: batch[name] for name in head.reads})``. They are

    - latent: (B, 4, H/8, W/8) float, the clean latent times the LDM's scaling factor;
    - image: (B, H, W, 3) uint8 RGB;
    - text: (B, tokens, width) float, the prompt's embedding. Where the LDM has it (SDXL),
      ``text_pooled`` (B, pooled width) float comes with it, so let it be optional;
    - features: block number to (B, channels, h, w) float, one of the stored draws.

    Attributes:
        name: the head's name in ``registry.HEADS``, which its saved config holds.
        reads: some of latent, image, text and features.
        feature_channels: channels of each block that ``forward`` needs in ``features``, by number;
            the constructor sets it if the head reads features.
    """

    name: ClassVar[str]
    reads: ClassVar[frozenset[str]]
    feature_channels: Mapping[int, int] = MappingProxyType({})

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        """Keep the subclass's constructor arguments, JSON-safe, for ``config``."""
        super().__init__()
        # Through JSON, so that tuples and int keys are the same before and after saving.
        self._arguments = json.dumps(arguments)

    @classmethod
    def from_layers(cls, inputs: HeadInputs, ldm: LDMNetwork, options: Any) -> Self:
        """Build a new head.

        Args:
            inputs: what the layers hold for it.
            ldm: the network that they were made with. ``ldm.load`` reads its weights, where the
                head has the same layers and the config asks for them, and is None otherwise.
            options: of the head's own options class.

        Raises:
            ValueError: the head cannot be built for these inputs.
        """
        raise NotImplementedError

    @property
    def last_layer(self) -> nn.Conv2d:
        """The convolution whose output are the logits; nothing but resizing comes after it."""
        raise NotImplementedError

    def enable_gradient_checkpointing(self) -> None:
        """Recompute inner values in the backward pass where that saves memory worth the time.

        Does nothing unless a head overrides it.
        """

    @torch.no_grad()
    def start_at_prior(self, share: float) -> None:
        """Make a new head predict ``share``, the training masks' mean area, everywhere.

        Adds logit(share) to the bias of the last convolution, whose outputs start about 0 (Lin et
        al. 2017, "Focal loss", section 4.1). Adam moves a bias by at most one learning rate a
        step: from 0 it would take thousands of steps to say that most is background, and the rest
        of the network would learn little until then.

        Raises:
            ValueError: ``share`` is not inside (0, 1).
        """
        if not 0.0 < share < 1.0:
            raise ValueError(f"{type(self).__name__}: share must be inside (0, 1), got {share}")
        assert self.last_layer.bias is not None
        self.last_layer.bias.add_(math.log(share / (1.0 - share)))

    @property
    def config(self) -> dict[str, Any]:
        """JSON-safe: the head's name under "head", and the arguments of its constructor."""
        return {"head": self.name, **json.loads(self._arguments)}

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype; inputs are cast to it."""
        return next(self.parameters()).dtype

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build a head with fresh weights from what ``config`` returned.

        Raises:
            ValueError: the config is another head's, holds an unknown key or lacks one, or a value
                that the constructor does not take.
        """
        arguments = dict(config)
        name = arguments.pop("head", None)
        if name != cls.name:
            raise ValueError(
                f'{cls.__name__}: config key "head" must be {cls.name!r}, got {name!r}'
            )
        parameters = inspect.signature(cls).parameters
        if unknown := sorted(arguments.keys() - parameters.keys()):
            raise ValueError(
                f"{cls.__name__}: config keys must be some of {list(parameters)}, got {unknown}"
            )
        for key, parameter in parameters.items():
            if parameter.default is parameter.empty and key not in arguments:
                raise ValueError(
                    f"{cls.__name__}: config must hold {key!r}, got only {sorted(config)}"
                )
        return cls(**arguments)

    def save_pretrained(self, folder: Path | str) -> None:
        """Write ``model.safetensors``, then ``config.json``, into ``folder``, made if need be.

        Each is written beside its place and renamed, so a reader sees a whole file or none.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        temporary = folder / f".saving-{os.getpid()}"
        save_file(weights, temporary)
        temporary.chmod(folder.stat().st_mode & 0o666)  # safetensors gives it to its owner alone
        temporary.replace(folder / "model.safetensors")
        temporary.write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")
        temporary.replace(folder / "config.json")

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> Self:
        """Read a head of this class from ``folder``, on the CPU, in the dtype it was saved in.

        Raises:
            ValueError: no saved head, another class's, weights that do not fit the config, or a
                weight that is NaN or infinite.
        """
        folder = Path(folder)
        config, path = read_config(folder), folder / "model.safetensors"
        try:
            with torch.device("meta"):  # no memory or time for weights that are replaced
                head = cls.from_config(config)
        except ValueError as error:
            raise ValueError(f"{folder / 'config.json'}: {error}") from error
        try:
            weights = load_file(path)
            head.load_state_dict(weights, assign=True)
        except (SafetensorError, RuntimeError, FileNotFoundError) as error:
            raise ValueError(
                f"{path}: expected the weights that config.json describes, got: {error}"
            ) from error
        for name, weight in weights.items():
            # By the extremes: one pass without a copy, for large weights.
            if weight.numel() and not all(bool(edge.isfinite()) for edge in weight.aminmax()):
                raise ValueError(
                    f"{path}: {name} must be finite, got NaN or infinite values; the run that "
                    "wrote it diverged: take an earlier checkpoint"
                )
        return head


def is_positive(value: object) -> bool:
    """Whether a config's value is a whole number above 0; a bool is not."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def read_by_block(given: object, *, key: str, where: str) -> dict[int, Any]:
    """Return a mapping by block number with int keys, which JSON turns into strings.

    ``key`` names the argument, ``where`` the head.

    Raises:
        ValueError: no mapping, or a key is no block number.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}: {key} must be a mapping by block number, got {given!r}")
    for number in given:
        if not is_positive(int(number) if str(number).isdecimal() else number):
            raise ValueError(
                f"{where}: {key} must have block numbers as keys, such as 6, got {number!r}"
            )
    return {int(number): value for number, value in given.items()}


def check_feature(
    features: Mapping[int, Tensor],
    number: int,
    *,
    channels: Mapping[int, int],
    where: str,
    batch: int | None = None,
) -> Tensor:
    """Return the feature (B, C, h, w) of one block after checking its shape.

    ``channels`` maps every block that the head reads to its channels; ``where`` names the head.

    Raises:
        ValueError: the block is missing, or its feature has another shape or no values.
    """
    if number not in features:
        raise ValueError(
            f"{where}: features must hold blocks {list(channels)}, got {sorted(features)} without "
            f"block {number}; encode a features layer with it, or build the head for the blocks "
            "there are"
        )
    shape = tuple(features[number].shape)
    if len(shape) != 4 or shape[1] != channels[number] or batch not in (None, shape[0]):
        raise ValueError(
            f"{where}: feature of block {number} must be ({batch or 'B'}, {channels[number]}, h, "
            f"w), got {shape}"
        )
    if 0 in shape:
        raise ValueError(
            f"{where}: feature of block {number} must have at least one row and sides above 0, "
            f"got {shape}; skip empty batches"
        )
    return features[number]
