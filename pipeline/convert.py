"""``convert``: what others published, as what is read here.

Data flow: source -> what it is -> tensors by name (models/checkpoint_file) -> parts and a head
(models/convert_ldm, models/convert_head) -> a new folder, renamed into place when it is whole.
A converted head's folder is a checkpoint like a trained one's, its latent diffusion model beside
it under ``ldm/``.
"""

import hashlib
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import yaml
from diffusers import DDPMScheduler, UNet2DConditionModel
from huggingface_hub import snapshot_download
from torch import Tensor

from models.convert.checkpoint_file import load_state_dict_file
from models.convert.head import ConvertedHead, convert_head
from models.convert.ldm import (
    TOKENIZER_FILES,
    UNET_PREFIX,
    Account,
    ConvertedLDM,
    check_schedule,
    convert_ldm,
    convert_parts,
    count_keys,
    is_schedule,
    write_ldm,
)
from models.convert.pickles import convert_pickles
from models.convert.unet_names import ConversionError
from models.heads.ldznet import LDZNet
from models.heads.znet import ZNet
from models.ldm.blocks import list_blocks
from models.ldm.conditions import find_text_width
from models.ldm.family import read_configs
from models.ldm.files import list_model_files, load_part
from models.new_folder import write_new_folder
from pipeline.runs.checkpoint import LDM_FOLDER, CheckpointRecord, Conversion, write_record
from pipeline.spec.build_layers import build_layers
from pipeline.spec.fields import FeaturesSpec, LatentsSpec, Spec, UniformTimesteps
from pipeline.spec.layer import LayerSpec

DEFAULT_TOKENIZER = "openai/clip-vit-large-patch14"


"""The hub id of the tokenizer that CompVis's code names for Stable Diffusion 1.x."""


SPEC_FILE = "spec.yaml"
PAPER_SIZE_PX = 384
PAPER_PROMPT = "a photo of a {}."
PAPER_TIMESTEPS = UniformTimesteps(low=300, high=500, draws=1)
_FROZEN = "sd_features_stage_model.model."
_LATENT_PARTS = ("vae", "text_encoder")


@dataclass(frozen=True)
class ConvertOptions:
    """How to convert, beside source and out; ``None`` is what the source has."""

    tokenizer: str | None = None  # folder or hub id
    ldm: Path | None = None  # diffusers folder with the parts that a head's file lacks
    num_heads: int = 8  # of the UNets: no shape tells
    dtype: torch.dtype | None = None  # of the weights written
    weights: Literal["ema", "raw"] | None = None  # of a plain file's UNet; None: EMA copies


def run_convert(source: Path, out: Path, options: ConvertOptions) -> list[str]:
    """Convert a folder of pickles, a CompVis checkpoint or an LD-ZNet checkpoint to ``out``.

    Returns lines that say what was found, what became of it, and where it is.

    Raises:
        ValueError: ``source`` is none of these, holds what is not accounted for, or misses a part;
            ``out`` holds something; an option does not go with the source.
    """
    if source.is_dir():
        _refuse_options(
            options, {"--tokenizer", "--ldm", "--dtype", "--weights"}, "a folder of pickles"
        )
        lines = convert_pickles(source, out).describe()
        return [f"{source}: a diffusers folder with pickles", *lines, f"wrote {out}"]
    state = load_state_dict_file(source)
    if any(key.startswith(f"{UNET_PREFIX}final.") for key in state):
        found, lines = "an LD-ZNet checkpoint", _convert_checkpoint(state, source, out, options)
    elif any(key.startswith(UNET_PREFIX) for key in state):
        found = "a CompVis Stable Diffusion checkpoint"
        _refuse_options(options, {"--ldm"}, found)
        account = convert_ldm(
            state,
            out=out,
            tokenizer=find_tokenizer(options.tokenizer),
            num_heads=options.num_heads,
            dtype=options.dtype,
            raw=options.weights == "raw",
        )
        lines = account.describe()
    else:
        raise ConversionError(
            f"{source}: expected a CompVis Stable Diffusion or LD-ZNet checkpoint, with keys "
            f"{UNET_PREFIX}…, got {len(state)} keys such as {next(iter(state))}"
        )
    return [f"{source}: {found}, {len(state)} tensors", *lines, f"wrote {out}"]


def _refuse_options(options: ConvertOptions, refused: set[str], found: str) -> None:
    values = {
        "--tokenizer": options.tokenizer,
        "--ldm": options.ldm,
        "--dtype": options.dtype,
        "--weights": options.weights,
    }
    given = sorted(name for name in refused if values[name] is not None)
    if given:
        raise ValueError(f"{', '.join(given)}: does not go with {found}; leave it out")


def find_tokenizer(name: str | None) -> Path:
    """Return the folder of a CLIP tokenizer: a folder, one with ``tokenizer/``, or a hub id's.

    Raises:
        ConversionError: neither.
    """
    folder = Path(name or DEFAULT_TOKENIZER).expanduser()
    for candidate in (folder, folder / "tokenizer"):
        if (candidate / "vocab.json").is_file():
            return candidate
    hub_id = name or DEFAULT_TOKENIZER
    if folder.exists() or hub_id.startswith((".", "/", "~")) or hub_id.count("/") != 1:
        raise ConversionError(
            f"--tokenizer {hub_id}: expected a folder with vocab.json and merges.txt, or a hub id"
        )
    patterns = [f"{prefix}{file}" for prefix in ("", "tokenizer/") for file in TOKENIZER_FILES]
    try:
        snapshot = Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # the hub's errors derive from these two
        raise ConversionError(
            f"tokenizer: {hub_id!r} could not be fetched from the hub ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}); give a folder with vocab.json and merges.txt by "
            "--tokenizer, such as the tokenizer/ of a Stable Diffusion 1.x folder"
        ) from error
    return snapshot / "tokenizer" if (snapshot / "tokenizer").is_dir() else snapshot


def _convert_checkpoint(
    state: Mapping[str, Tensor], source: Path, out: Path, options: ConvertOptions
) -> list[str]:
    _refuse_options(options, {"--weights"}, "an LD-ZNet checkpoint, which says it itself")
    converted = convert_head(state, num_heads=options.num_heads, dtype=options.dtype)
    head = converted.head
    with write_new_folder(out) as folder:
        lines = _write_head_ldm(state, head, folder / LDM_FOLDER, options)
        check_fit(head, folder / LDM_FOLDER)
        head.save_pretrained(folder)
        spec = _describe_inputs(head, folder / LDM_FOLDER)
        place = str((out / LDM_FOLDER).absolute())
        latents, features = (_move(layer, place) for layer in build_layers(spec))
        assert latents is not None
        with source.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        origin = Conversion(file=source.name, sha256=digest)
        record = CheckpointRecord(step=0, latents=latents, features=features, converted=origin)
        write_record(folder, record)
        _write_spec(folder / SPEC_FILE, spec, place)
    return [*_describe_head(converted), *lines]


def _describe_head(converted: ConvertedHead) -> list[str]:
    what = type(converted.head).__name__
    if isinstance(converted.head, LDZNet):
        config = converted.head.config
        what += f", blocks {config['blocks']}, {config['size_px']} px"
    what += f"; {converted.ema}"
    if converted.mixed:
        what += f"; {converted.mixed}"
    lines = [f"converted {count_keys(len(converted.converted))}: head ({what})"]
    # The scale is the LDM's, whose account names it.
    rules = Counter(rule for key, rule in converted.ignored.items() if key != "scale_factor")
    return lines + [f"ignored {count_keys(num)}: {rule}" for rule, num in rules.items()]


def _write_head_ldm(
    state: Mapping[str, Tensor], head: LDZNet | ZNet, folder: Path, options: ConvertOptions
) -> list[str]:
    """Write the LDM that a head was trained over; what its file lacks comes from ``--ldm``.

    The UNet's weights are the raw ones: see ``prefer_ema``.
    """
    check_schedule(state)
    converted = _convert_frozen(state, options)
    parts = converted.parts
    wanted = (*_LATENT_PARTS, "unet") if "features" in head.inputs else _LATENT_PARTS
    missing = [name for name in wanted if name not in parts]
    if missing and options.ldm is None:
        raise ConversionError(
            f"checkpoint: holds no {', '.join(missing)} of the latent diffusion model that the "
            "head was trained over; give its diffusers folder by --ldm: sd-v1-4-full-ema.ckpt "
            "converted with --weights raw, which is what LD-ZNet's public code reads"
        )
    if options.ldm is not None and not missing:
        raise ValueError("--ldm: the checkpoint holds every part that its head reads; leave it out")
    tokenizer = options.tokenizer or (str(options.ldm) if options.ldm else None)
    if options.ldm is not None:
        _check_scheduler(options.ldm)
        for name in list_model_files(options.ldm, missing):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(options.ldm / name, folder / name)
    write_ldm(folder, parts, tokenizer=find_tokenizer(tokenizer))
    lines = _name_frozen(converted.account, state).describe()
    return lines + [f"copied {name} from {options.ldm}" for name in missing]


def _convert_frozen(state: Mapping[str, Tensor], options: ConvertOptions) -> ConvertedLDM:
    try:
        return convert_parts(
            _select_frozen(state), num_heads=options.num_heads, dtype=options.dtype, raw=True
        )
    except ConversionError as error:
        raise ConversionError(
            f"the frozen latent diffusion model (its UNet's keys under {_FROZEN}): {error}"
        ) from error


def _select_frozen(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the frozen LDM under a CompVis checkpoint's names: its UNet's prefix taken off.

    Raises:
        ConversionError: a part is there twice.
    """
    found: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key.startswith(("model.", "model_ema.")) or is_schedule(key):
            continue  # the head's, and its copy of the schedule
        name = key.removeprefix(_FROZEN)
        if name in found:
            raise ConversionError(f"checkpoint: holds {name} twice, once under {_FROZEN}")
        found[name] = tensor
    return found


def _name_frozen(account: Account, state: Mapping[str, Tensor]) -> Account:
    """Return the account under the file's own keys."""

    def place(key: str) -> str:
        return _FROZEN + key if _FROZEN + key in state else key

    converted = {place(key): part for key, part in account.converted.items()}
    ignored = {place(key): rule for key, rule in account.ignored.items()}
    return Account(converted, ignored, account.notes)


def _check_scheduler(ldm: Path) -> None:
    schedule = load_part(DDPMScheduler, ldm, "scheduler")
    check_schedule({"alphas_cumprod": schedule.alphas_cumprod})


def check_fit(head: LDZNet | ZNet, ldm: Path) -> None:
    """Check that an LDM gives what a head reads: latents, text and features of its widths.

    Raises:
        ModelFilesError: the folder is no LDM of a family that is read.
        ConversionError: a width is another one.
    """
    frozen_unet = ("unet",) if isinstance(head, LDZNet) else ()
    configs = read_configs(ldm, need=("vae", "text_encoder", *frozen_unet))
    unet = head.unet.config
    pairs = {
        "latent channels": (unet.in_channels, configs["vae"].get("latent_channels", 4)),
        "text width": (find_text_width(unet), configs["text_encoder"].get("hidden_size")),
    }
    if isinstance(head, LDZNet):
        with torch.device("meta"):
            blocks = list_blocks(UNet2DConditionModel.from_config(configs["unet"]))
        channels = {block.number: block.channels for block in blocks}
        for number, wanted in head.feature_channels.items():
            pairs[f"channels of block {number}"] = (wanted, channels.get(number))
    for name, (wanted, given) in pairs.items():
        if wanted != given:
            raise ConversionError(
                f"{ldm}: does not fit the head: {name} must be {wanted}, got {given}; give the "
                "latent diffusion model that the head was trained over"
            )


def _describe_inputs(head: LDZNet | ZNet, ldm: Path) -> Spec:
    """What the published code feeds a head: LDZNET.md's size, prompt and timesteps."""
    size_px, features = PAPER_SIZE_PX, None
    if isinstance(head, LDZNet):
        size_px = int(head.config["size_px"])
        features = FeaturesSpec(blocks=tuple(head.feature_channels), timesteps=PAPER_TIMESTEPS)
    latents = LatentsSpec(model=str(ldm), size=size_px, prompts=(PAPER_PROMPT,))
    return Spec(latents=latents, features=features)


def _move(layer: LayerSpec | None, place: str) -> LayerSpec | None:
    """Return a layer whose model lies elsewhere; where it lies is not in its fingerprint."""
    return layer and layer.model_copy(update={"source": {**layer.source, "model": place}})


def _write_spec(path: Path, spec: Spec, place: str) -> None:
    """Write the spec to encode with, so that a store has the layers that the head reads."""
    plain = spec.model_dump(mode="json", exclude_none=True)
    plain["latents"]["model"] = place
    path.write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), encoding="utf-8")
