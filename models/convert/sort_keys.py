"""Sorts the keys of a CompVis checkpoint by model, and accounts for what becomes of each.

A key belongs to a model, or is ignored by a rule that the account names, or is an error. Where a
UNet has moving averages (EMA) beside its raw weights, one of the two sets is selected here.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from models.convert.check_weights import check_weights
from models.convert.names import ConversionError
from models.ldm.files import list_some

UNET_PREFIX = "model.diffusion_model."
HEAD_PREFIX = f"{UNET_PREFIX}final."
"""What LD-ZNet's and ZNet's heads have beside their UNet, and a plain UNet has not."""

FROZEN_PREFIX = "sd_features_stage_model.model."
"""Where LD-ZNet's checkpoint holds the frozen model that its features come from."""

_STARTS = {
    UNET_PREFIX: "unet",
    "model_ema.": "unet",
    "first_stage_model.": "vae",
    "cond_stage_model.transformer.": "text_encoder",
}
_PREFIXES = {
    "head": "model.",
    "unet": "model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.",
}
# CompVis's DDPM registers these; all but alphas_cumprod follow from it.
_SCHEDULE = (
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod"),
    *("sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod"),
    *("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance"),
    *("posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
    *("lvlb_weights", "logvar", "cond_ids"),
)
_RULES = {
    rf"{'|'.join(_SCHEDULE)}": "diffusion schedule, which follows from the scheduler's config",
    r"(first_stage_model\.)?model_ema\.(decay|num_updates)": "counters of the moving average",
    r"scale_factor": "scale of the latents, kept in the VAE's config",
    r"first_stage_model\.(loss|discriminator)\..*": "the VAE's training loss and discriminator",
    r"cond_stage_model\.transformer\.(text_model\.)?embeddings\.position_ids": (
        "position ids, counted when loaded"
    ),
}


@dataclass(frozen=True)
class Account:
    """What became of each key of a file: the model it went to, or the rule it was ignored by."""

    converted: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)  # model -> what was chosen for it

    def add_note(self, model: str, note: str) -> None:
        """Append a note to a model's, after a semicolon; an empty one is left out."""
        self.notes[model] = "; ".join(filter(None, (self.notes.get(model), note)))

    def describe(self) -> list[str]:
        """Return a line a model and a line a rule, with numbers of keys."""
        lines = []
        for model, num in Counter(self.converted.values()).items():
            note = f" ({self.notes[model]})" if self.notes.get(model) else ""
            lines.append(f"converted {_count_keys(num)}: {model}{note}")
        for rule, num in Counter(self.ignored.values()).items():
            lines.append(f"ignored {_count_keys(num)}: {rule}")
        return lines


def _count_keys(num: int) -> str:
    return f"{num} key" if num == 1 else f"{num} keys"


@dataclass(frozen=True)
class SortedState:
    """A checkpoint's tensors by key, and its keys by model.

    ``keys`` has those of ``head``, ``unet``, ``vae`` and ``text_encoder``, as far as the checkpoint
    holds them; ``prefixes`` what stands before each model's names. ``account`` is complete when
    each of these models is converted.
    """

    tensors: Mapping[str, Tensor]
    keys: dict[str, list[str]]
    prefixes: dict[str, str]
    account: Account

    def list_weights(self, model: str) -> dict[str, Tensor]:
        """Return a VAE's or text encoder's weights by name, checked, and enter them."""
        prefix = self.prefixes[model]
        weights = {key: self.tensors[key] for key in self.keys[model]}
        check_weights(weights)
        self.account.converted.update(dict.fromkeys(weights, model))
        return {key.removeprefix(prefix): tensor for key, tensor in weights.items()}

    def select_weights(self, model: str, *, raw: bool = False) -> dict[str, Tensor]:
        """Return a UNet's weights by name: the EMA copies where there are any, or the raw ones.

        LD-ZNet's head predicts with the EMA copies (``ema_scope``), as Stable Diffusion's sampling
        does. The frozen UNet that the features come from does not: LD-ZNet's code builds it from
        configs/stable-diffusion/v1-inference.yaml, whose ``use_ema: False`` leaves ``ema_scope``
        nothing to do, so that it runs on the raw weights.

        A name is what follows ``model.diffusion_model.``; a copy's key is ``model_ema.`` and the
        rest of its parameter's key without the dots. The weights are checked and entered.

        Raises:
            ConversionError: there is no UNet, the EMA copies are not those of its parameters, their
                number of updates is not one finite number, or a weight is no finite float.
        """
        prefix = self.prefixes[model]
        start, ema = f"{prefix}diffusion_model.", f"{prefix.removesuffix('model.')}model_ema."
        own = {key.removeprefix(start): key for key in self.keys[model] if key.startswith(start)}
        if not own:
            raise ConversionError(
                f"checkpoint: expected a UNet's weights under {start!r}, got none among "
                f"{len(self.tensors)} keys; give the state_dict of a CompVis or LD-ZNet checkpoint"
            )
        num_updates = _read_num_updates(self.tensors, f"{ema}num_updates")
        copies = {key for key in self.keys[model] if not key.startswith(start)}
        sources, note, rule = own, "raw: the checkpoint holds no EMA copies", ""
        if copies:
            matched = _match_copies(self.tensors, own, copies, ema)
            note = "raw, not the EMA copies beside them"
            rule = "moving averages of the UNet, whose raw weights are converted"
            if not raw:
                sources, note = matched, f"EMA after {num_updates} updates"
                rule = "raw weights of the UNet, whose moving averages are converted"
        weights = {name: self.tensors[key] for name, key in sources.items()}
        check_weights({sources[name]: tensor for name, tensor in weights.items()})
        self.account.add_note(model, f"{len(weights)} weights, {note}")
        self.account.converted.update(dict.fromkeys(sources.values(), model))
        unused = {*own.values(), *copies} - set(sources.values())
        self.account.ignored.update(dict.fromkeys(sorted(unused), rule))
        return weights


def sort_keys(state: Mapping[str, Tensor]) -> SortedState:
    """Sort the keys of a CompVis Stable Diffusion 1.x or LD-ZNet checkpoint by model.

    LD-ZNet's checkpoint is that of a Lightning module: its own UNet is the head, and the model that
    the features come from lies under ``sd_features_stage_model.model.``, all of it or its UNet
    alone.

    Raises:
        ConversionError: a key is of no model and no rule, or the frozen model holds a key that is
            there without its prefix too.
    """
    has_head = any(key.startswith(HEAD_PREFIX) for key in state)
    result = SortedState(state, {}, {}, Account())
    seen: set[str] = set()
    unknown = []
    for key in state:
        name = key.removeprefix(FROZEN_PREFIX) if has_head else key
        model = next((m for start, m in _STARTS.items() if name.startswith(start)), None)
        rule = next((r for pattern, r in _RULES.items() if re.fullmatch(pattern, name)), None)
        if has_head and name == key and (model == "unet" or name in _SCHEDULE):
            model = "head" if model else None  # the head has a schedule and counters of its own
        elif name in seen:
            raise ConversionError(f"checkpoint: holds {name} twice, once under {FROZEN_PREFIX}")
        else:
            seen.add(name)
        if rule:
            result.account.ignored[key] = rule
        elif model:
            result.keys.setdefault(model, []).append(key)
            prefix = key.removesuffix(name) + _PREFIXES[model]
            if result.prefixes.setdefault(model, prefix) != prefix:
                raise ConversionError(
                    f"checkpoint: holds weights of one {model} with and without {FROZEN_PREFIX}, "
                    f"such as {key}"
                )
        else:
            unknown.append(key)
    if unknown:
        hint = ""
        if any(key.startswith("cond_stage_model.model.") for key in unknown):
            hint = " (an OpenCLIP text encoder: Stable Diffusion 2)"
        raise ConversionError(
            f"checkpoint: {len(unknown)} keys are of no known model{hint}: {list_some(unknown)}; "
            "this converts Stable Diffusion 1.x and the published LD-ZNet"
        )
    return result


def _read_num_updates(state: Mapping[str, Tensor], key: str) -> int | str:
    if key not in state:
        return "an unknown number of"
    updates = state[key]
    if updates.numel() != 1 or updates.is_complex() or not bool(updates.isfinite().all()):
        raise ConversionError(
            f"{key}: expected one number of updates, got {updates.dtype} of shape "
            f"{tuple(updates.shape)}; the file is damaged"
        )
    return int(updates)


def _match_copies(
    state: Mapping[str, Tensor], own: Mapping[str, str], copies: set[str], ema: str
) -> dict[str, str]:
    """Map each name to the key of its EMA copy: all of them, and no copy left over."""
    wanted = {name: ema + f"diffusion_model.{name}".replace(".", "") for name in own}
    if missing := [own[name] for name, key in wanted.items() if key not in copies]:
        raise ConversionError(
            f"{ema}: expected an EMA copy of each of {len(own)} parameters, got none of "
            f"{list_some(missing)}; take a whole checkpoint, or remove every {ema} key to convert "
            "the raw weights"
        )
    if len(set(wanted.values())) < len(wanted) or copies - set(wanted.values()):
        left = list_some(copies - set(wanted.values())) or "two parameters with one copy"
        raise ConversionError(f"{ema}: expected a copy for each parameter and no other, got {left}")
    for name, key in wanted.items():
        if state[key].shape != state[own[name]].shape:
            raise ConversionError(
                f"{key}: the EMA copy must have its parameter's shape "
                f"{tuple(state[own[name]].shape)}, got {tuple(state[key].shape)}"
            )
    return wanted
