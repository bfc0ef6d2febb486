"""Checks of weights before they are written: finite numbers, of one dtype, those of their class.

A folder that lacks a weight looks whole, for a loader fills it up with random numbers. Here a
model's weights are compared with the class that will load them, built without memory.
"""

from collections.abc import Iterable, Mapping
from functools import reduce

import torch
from torch import Tensor, nn

from models.convert.names import ConversionError
from models.ldm.files import list_some

WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of weights that are converted: 8-bit ones need scales that CompVis's files lack."""


def check_weights(weights: Mapping[str, Tensor]) -> None:
    """Check that each tensor is dense, floating, has a dimension, and is finite throughout.

    Args:
        weights: tensors by their keys in the checkpoint, which an error names.

    Raises:
        ConversionError: one is not.
    """
    for key, tensor in weights.items():
        if tensor.dtype not in WEIGHT_DTYPES or tensor.layout != torch.strided:
            kinds = ", ".join(map(format_dtype, WEIGHT_DTYPES))
            raise ConversionError(
                f"{key}: expected a dense tensor of {kinds}, got {format_dtype(tensor.dtype)} "
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


def match_weights(
    weights: Mapping[str, Tensor],
    network: nn.Module,
    names: Mapping[str, str],
    *,
    where: str,
    prefix: str,
) -> dict[str, Tensor]:
    """Return a checkpoint's weights by the parameters' names of the class that will load them.

    Each weight must be a parameter of the class, each parameter must be there, with its shape.

    Args:
        weights: by their names in the checkpoint, below ``prefix``.
        network: the class's instance; on the meta device it costs no memory.
        names: name of each of its parameters to that in the checkpoint, below ``prefix``.
        where: the model, for errors.

    Raises:
        ConversionError: they differ; says which keys of the checkpoint.
    """
    expected = {names[name]: tuple(w.shape) for name, w in network.state_dict().items()}
    wrong = []
    if missing := expected.keys() - weights.keys():
        wrong.append(f"lacks {_count(prefix, missing)}")
    if unexpected := weights.keys() - expected.keys():
        wrong.append(f"has {_count(prefix, unexpected)} besides")
    shapes = [
        f"{name} {tuple(weights[name].shape)} in place of {shape}"
        for name, shape in expected.items()
        if name in weights and tuple(weights[name].shape) != shape
    ]
    if shapes:
        wrong.append(f"has other shapes at {_count(prefix, shapes)}")
    if wrong:
        hint = ""
        if any(name.startswith("label_emb") for name in unexpected):
            hint = "; class-conditional UNets (label_emb) are not converted"
        raise ConversionError(
            f"{where}: the checkpoint {'; '.join(wrong)}; it is not whole, or of another model "
            f"than Stable Diffusion 1.x or the published LD-ZNet{hint}"
        )
    return {name: weights[theirs] for name, theirs in names.items()}


def _count(prefix: str, names: Iterable[str]) -> str:
    names = [prefix + name for name in names]
    return f"{len(names)}: {list_some(names)}"


def unify_dtype(
    weights: Mapping[str, Tensor], dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], str]:
    """Convert a model's weights to one dtype, and say so where they had several.

    Args:
        weights: by name.
        dtype: the one, or None for the narrowest that holds all of them (float32 for float16
            beside bfloat16).

    Returns:
        The weights, and a note that is empty where they had one dtype.

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
                f"{format_dtype(target)}; give a wider --dtype, or none"
            )
    if len(found) == 1:
        return unified, ""
    mixed = " and ".join(sorted(map(format_dtype, found)))
    return unified, f"{mixed} in the file, all {format_dtype(target)} here"


def format_dtype(dtype: torch.dtype) -> str:
    """Return ``float16`` for ``torch.float16``."""
    return str(dtype).removeprefix("torch.")
