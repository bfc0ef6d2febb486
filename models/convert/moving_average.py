"""A UNet's weights out of a CompVis checkpoint: its moving averages (EMA), or the raw ones.

"Name" is a parameter's name below ``model.diffusion_model.``, as in models/compvis_names.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from models.convert.unet_names import ConversionError, list_some

_UNET = "diffusion_model."
_EMA_BUFFERS = ("decay", "num_updates")


@dataclass(frozen=True, slots=True)
class EmaReport:
    """Which weights were taken, and from where.

    ``used`` is whether they are the EMA copies; ``num_updates`` how many updates the average has
    seen, None where the checkpoint does not say; ``sources`` maps each name to its key in the
    checkpoint; ``left`` is whether there are copies that were not to be taken.
    """

    used: bool
    num_updates: int | None
    sources: Mapping[str, str]
    left: bool = False

    def __str__(self) -> str:
        kind = "raw: the checkpoint holds no EMA copies"
        if self.left:
            kind = "raw, not the EMA copies beside them"
        if self.used:
            updates = "an unknown number of" if self.num_updates is None else self.num_updates
            kind = f"EMA after {updates} updates"
        return f"{len(self.sources)} weights, {kind}"


def prefer_ema(
    state: Mapping[str, Tensor], *, prefix: str = "", raw: bool = False
) -> tuple[dict[str, Tensor], EmaReport]:
    """Return the UNet's weights by name, the EMA copies where there are any, else the raw ones.

    LD-ZNet's head predicts with the EMA copies (``ema_scope``), as Stable Diffusion's sampling
    does. The frozen UNet that the features come from does not: LD-ZNet's code builds it from
    configs/stable-diffusion/v1-inference.yaml, whose ``use_ema: False`` leaves ``ema_scope``
    nothing to do, so that it runs on the weights under ``model.diffusion_model``: ``raw``.

    A copy is named as the parameter below ``{prefix}model.``, without the dots, below
    ``{prefix}model_ema.``. The tensors are the state's own, not copied.

    Args:
        state: a checkpoint's ``state_dict``.
        prefix: what comes before ``model.`` and ``model_ema.``: nothing in a checkpoint's own
            model, ``sd_features_stage_model.model.`` for LD-ZNet's frozen UNet.
        raw: take the raw weights, whether or not there are EMA copies.

    Raises:
        ConversionError: no UNet there, EMA copies that are not those of its parameters, or a
            count of updates that is none.
    """
    start, ema = f"{prefix}model.{_UNET}", f"{prefix}model_ema."
    own = {key.removeprefix(start): key for key in state if key.startswith(start)}
    if not own:
        raise ConversionError(
            f"checkpoint: expected a UNet's weights under {start!r}, got none among {len(state)} "
            "keys; give the state_dict of a CompVis or LD-ZNet checkpoint"
        )
    copies = {key for key in state if key.startswith(ema)}
    copies -= {ema + name for name in _EMA_BUFFERS}
    num_updates = _read_num_updates(state, ema + "num_updates")
    sources = _match_copies(own, copies, ema) if copies else own
    for name, key in sources.items():
        if state[key].shape != state[own[name]].shape:
            raise ConversionError(
                f"{key}: the EMA copy must have its parameter's shape "
                f"{tuple(state[own[name]].shape)}, got {tuple(state[key].shape)}"
            )
    if raw:
        sources = own
    report = EmaReport(
        used=bool(copies) and not raw,
        num_updates=num_updates,
        sources=sources,
        left=bool(copies) and raw,
    )
    return {name: state[key] for name, key in sources.items()}, report


def _read_num_updates(state: Mapping[str, Tensor], key: str) -> int | None:
    if key not in state:
        return None
    updates = state[key]
    if updates.numel() != 1 or updates.is_complex() or not bool(updates.isfinite().all()):
        raise ConversionError(
            f"{key}: expected one number of updates, got {updates.dtype} of shape "
            f"{tuple(updates.shape)}; the file is damaged"
        )
    return int(updates)


def _match_copies(raw: Mapping[str, str], copies: set[str], ema: str) -> dict[str, str]:
    """Map each name to the key of its EMA copy: all of them, and no copy left over."""
    wanted = {name: ema + (_UNET + name).replace(".", "") for name in raw}
    missing = [raw[name] for name, key in wanted.items() if key not in copies]
    if missing:
        raise ConversionError(
            f"{ema}: expected an EMA copy of each of {len(raw)} parameters, got none of "
            f"{list_some(missing)}; take a whole checkpoint, or remove every {ema} key to convert "
            "the raw weights"
        )
    if len(set(wanted.values())) < len(wanted) or copies - set(wanted.values()):
        left = list_some(copies - set(wanted.values())) or "two parameters with one copy"
        raise ConversionError(f"{ema}: expected a copy for each parameter and no other, got {left}")
    return wanted
