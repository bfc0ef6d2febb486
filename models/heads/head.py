"""What training and evaluation see of any head: named inputs, a JSON-safe config, a folder.

Shape suffixes: B batch, H/W image height and width, C a feature's channels, h/w its height and
width.
"""

import inspect
import json
import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


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

    @classmethod
    def from_ldm(cls, unet: UNet2DConditionModel, **options: Any) -> Self:
        """Build the head for an LDM's UNet, with its weights where the head has the same layers.

        ``options`` are the constructor's arguments beside those that follow from the UNet.
        """
        raise NotImplementedError

    @classmethod
    def from_ldm_config(cls, unet_config: Mapping[str, Any], **options: Any) -> Self:
        """Build the head for an LDM's UNet of this config, every weight fresh."""
        raise NotImplementedError

    @property
    def last_layer(self) -> nn.Conv2d:
        """The convolution whose output are the logits; nothing but resizing comes after it."""
        raise NotImplementedError

    def enable_gradient_checkpointing(self) -> None:
        """Recompute inner values in the backward pass where that saves memory worth the time."""
        raise NotImplementedError

    @torch.no_grad()
    def start_at_prior(self, share: float) -> None:
        """Let a new head predict ``share``, the training masks' mean area, everywhere at first.

        Moves the bias of the last convolution, whose outputs start about 0, by logit(share)
        (Lin et al. 2017, "Focal loss", section 4.1). Adam moves a bias by at most one
        learning rate a step, so from 0 a bias needs thousands of steps to say what is mostly
        background, and the rest of the network learns little before.

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
        return {"head": self.name, **json.loads(self._options)}

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
        options = dict(config)
        name = options.pop("head", None)
        if name != cls.name:
            raise ValueError(
                f'{cls.__name__}: config key "head" must be {cls.name!r}, got {name!r}'
            )
        parameters = inspect.signature(cls).parameters
        known = list(parameters)
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ValueError(f"{cls.__name__}: config keys must be some of {known}, got {unknown}")
        for key, parameter in parameters.items():
            if parameter.default is parameter.empty and key not in options:
                raise ValueError(
                    f"{cls.__name__}: config must hold {key!r}, got only {sorted(config)}"
                )
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
            if not is_finite(weight):
                raise ValueError(
                    f"{path}: {name} must be finite, got NaN or infinite values; the run that "
                    "wrote it diverged: take an earlier checkpoint"
                )
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


def is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite; one pass without a copy, for large weights."""
    return not values.numel() or all(bool(edge.isfinite()) for edge in values.aminmax())


def is_positive(value: object) -> bool:
    """Whether a config's value is a whole number above 0; a bool is not."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def check_block_numbers(blocks: object, *, where: str) -> list[int]:
    """Return block numbers in order, each once; ``where`` names the head.

    Raises:
        ValueError: no collection, or a member is no whole number above 0.
    """
    if (
        not isinstance(blocks, Collection)
        or isinstance(blocks, str | bytes | Mapping)
        or not all(is_positive(number) for number in blocks)
    ):
        raise ValueError(
            f"{where}: blocks must be a list of whole numbers, such as [6, 7], got {blocks!r}"
        )
    return sorted(set(blocks))


def read_by_block(given: object, *, key: str, where: str) -> dict[int, Any]:
    """Return a mapping by block number with int keys, which JSON turns into their digits.

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
    """Return the feature (B, C, h, w) of one block, its shape held to what the head takes.

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
    wanted = ("B" if batch is None else batch, channels[number])
    if len(shape) != 4 or shape[1] != wanted[1] or batch not in (None, shape[0]):
        raise ValueError(
            f"{where}: feature of block {number} must be ({wanted[0]}, {wanted[1]}, h, w), "
            f"got {shape}"
        )
    if 0 in shape:
        raise ValueError(
            f"{where}: feature of block {number} must have at least one row and sides above 0, "
            f"got {shape}; skip empty batches"
        )
    return features[number]
