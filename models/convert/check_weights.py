"""What weights must be before they are written: finite numbers, of one dtype, those of their class.

A folder that a loader fills up with random weights looks whole; here a part is held to the class
that will load it, built without memory from the part's own config.
"""

from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from models.convert.unet_names import ConversionError, list_some

WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of weights that are converted: 8-bit ones need scales that CompVis's files lack."""

# Published CLIP text weights carry this prefix, which transformers 5 no longer has in memory.
_TEXT_PREFIX = "text_model."


def check_weights(weights: Mapping[str, Tensor]) -> None:
    """Check that each tensor is dense, floating, has a dimension, and is finite throughout.

    Args:
        weights: tensors by their keys in the checkpoint, which an error names.

    Raises:
        ConversionError: one is not.
    """
    for key, tensor in weights.items():
        if tensor.dtype not in WEIGHT_DTYPES or tensor.layout != torch.strided:
            kinds = ", ".join(map(name_dtype, WEIGHT_DTYPES))
            raise ConversionError(
                f"{key}: expected a dense tensor of {kinds}, got {name_dtype(tensor.dtype)} "
                f"({tensor.layout}); convert the checkpoint that was not quantized"
            )
        if tensor.ndim == 0:
            raise ConversionError(f"{key}: expected a weight, got a single number, of no dimension")
        if not bool(tensor.isfinite().all()):
            num = int((~tensor.isfinite()).sum())
            raise ConversionError(
                f"{key}: expected finite weights, got NaN or infinity in {num} of "
                f"{tensor.numel()}; the file is damaged or its training diverged"
            )


def unify_dtype(
    weights: Mapping[str, Tensor], dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], str]:
    """Return a network's weights in one dtype, and what to say where they had several.

    ``dtype`` is the one, or None for the narrowest that holds all of them (float16 beside bfloat16
    gives float32). The second result is empty where the file had one dtype.

    Raises:
        ConversionError: a value is beyond ``dtype``.
    """
    found = {tensor.dtype for tensor in weights.values()}
    target = dtype or reduce(torch.promote_types, found)
    unified = {}
    for name, tensor in weights.items():
        unified[name] = tensor.to(target)
        if tensor.dtype != target and not bool(unified[name].isfinite().all()):
            raise ConversionError(
                f"{name}: holds values to {float(tensor.abs().max()):.3g}, beyond "
                f"{name_dtype(target)}; give a wider --dtype, or none"
            )
    if len(found) == 1:
        return unified, ""
    mixed = " and ".join(sorted(map(name_dtype, found)))
    return unified, f"{mixed} in the file, all {name_dtype(target)} here"


def name_dtype(dtype: torch.dtype) -> str:
    """Return ``float16`` for ``torch.float16``."""
    return str(dtype).removeprefix("torch.")


def check_complete(part: str, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Hold a part's weights to the class that loads it: every name, none besides, each shape.

    Args:
        part: ``unet``, ``vae`` or ``text_encoder``.
        config: its ``config.json``.
        weights: by their published names, as they are to be written.

    Raises:
        ConversionError: they differ, or the class refuses the config.
    """
    try:
        expected = _list_shapes(part, config)
    except ValueError as error:
        raise ConversionError(f"{part}: no model has the shapes of its weights: {error}") from error
    found = {name.removeprefix(_TEXT_PREFIX): tuple(w.shape) for name, w in weights.items()}
    wrong = []
    if missing := expected.keys() - found.keys():
        wrong.append(f"lacks {_count(missing)}")
    if unexpected := found.keys() - expected.keys():
        wrong.append(f"has {_count(unexpected)} besides")
    shapes = [
        f"{name} {found[name]} in place of {expected[name]}"
        for name in expected.keys() & found.keys()
        if expected[name] != found[name]
    ]
    if shapes:
        wrong.append(f"has other shapes at {_count(shapes)}")
    if wrong:
        raise ConversionError(
            f"{part}: the checkpoint {'; '.join(wrong)} (names and shapes are diffusers'); it is "
            "not whole, or of another model than Stable Diffusion 1.x"
        )


def _list_shapes(part: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        if part == "text_encoder":
            model = CLIPTextModel(CLIPTextConfig.from_dict(dict(config)))
        else:
            kind = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[part]
            model = kind.from_config(dict(config))
    return {
        name.removeprefix(_TEXT_PREFIX): tuple(weight.shape)
        for name, weight in model.state_dict().items()
    }


def _count(names: Iterable[str]) -> str:
    names = list(names)
    return f"{len(names)}: {list_some(names)}"
