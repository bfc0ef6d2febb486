"""``ldznet convert``: converts published checkpoints and folders of pickles to what is read here.

Data flow: source -> tensors by name (models/convert/checkpoint_file) -> keys by model (sort_keys)
-> models and a head (ldm, head) -> a new folder, renamed into place when it is whole. A converted
head's folder is a checkpoint like a trained one's, its latent diffusion model beside it under
``ldm/``.
"""

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import yaml
from diffusers import DDPMScheduler, UNet2DConditionModel
from huggingface_hub import snapshot_download

from models.convert.checkpoint_file import load_state_dict_file
from models.convert.head import convert_head
from models.convert.ldm import TOKENIZER_FILES, WEIGHT_FILES, check_schedule, convert_ldm, write_ldm
from models.convert.names import ConversionError
from models.convert.pickles import convert_pickles
from models.convert.sort_keys import UNET_PREFIX, SortedState, sort_keys
from models.heads.unet_head import UNetHead
from models.ldm.blocks import list_blocks
from models.ldm.family import read_configs
from models.ldm.files import list_model_files, load_component
from models.ldm.unet_config import read_text_width
from pipeline.base.whole_file import refuse_taken, write_new_folder
from pipeline.runs.checkpoint import LDM_FOLDER, CheckpointRecord, Conversion, write_record
from pipeline.spec.build_layers import build_layers
from pipeline.spec.fields import FeaturesSpec, LatentsSpec, Spec, UniformTimesteps
from pipeline.spec.layer import LayerSpec

DEFAULT_TOKENIZER = "openai/clip-vit-large-patch14"
"""The hub id of the tokenizer that CompVis's code names for Stable Diffusion 1.x."""

SPEC_FILE = "spec.yaml"  # to encode a store with that has the layers that the head reads
PAPER_SIZE_PX = 384
PAPER_PROMPT = "a photo of a {}."
PAPER_TIMESTEPS = UniformTimesteps(low=300, high=500, draws=1)
_LATENT_MODELS = ("vae", "text_encoder")


@dataclass(frozen=True)
class ConvertOptions:
    """Options of a conversion; ``None`` keeps what the source has."""

    tokenizer: str | None = None  # folder or hub id
    ldm: Path | None = None  # diffusers folder with the parts that a head's file lacks
    num_heads: int = 8  # of the UNets: no shape tells
    dtype: torch.dtype | None = None  # of the weights written
    weights: Literal["ema", "raw"] | None = None  # of a plain file's UNet; None: EMA copies


def run_convert(source: Path, out: Path, options: ConvertOptions) -> list[str]:
    """Convert a folder of pickles, a CompVis checkpoint or an LD-ZNet checkpoint to ``out``.

    Returns lines that say what was found, what became of it, and where it is.

    Raises:
        ValueError: ``source`` is none of these, holds what is not accounted for, or misses a model;
            ``out`` holds something; an option does not go with the source.
    """
    refuse_taken(out)
    if source.is_dir():
        _refuse_options(
            options, {"--tokenizer", "--ldm", "--dtype", "--weights"}, "a folder of pickles"
        )
        if out.absolute().is_relative_to(source.absolute()):
            raise ValueError(f"{out}: lies inside the folder to convert; give another --out")
        with write_new_folder(out) as folder:
            lines = convert_pickles(source, folder)
        return [f"{source}: a diffusers folder with pickles", *lines, f"wrote {out}"]
    tensors = load_state_dict_file(source)
    if not any(key.startswith(UNET_PREFIX) for key in tensors):
        raise ConversionError(
            f"{source}: expected a CompVis Stable Diffusion or LD-ZNet checkpoint, with keys "
            f"{UNET_PREFIX}…, got {len(tensors)} keys such as {next(iter(tensors))}"
        )
    state = sort_keys(tensors)
    if "head" in state.keys:
        found = "an LD-ZNet checkpoint"
        lines = _convert_ldznet(state, source, out, options)
    else:
        found = "a CompVis Stable Diffusion checkpoint"
        lines = _convert_stable_diffusion(state, out, options, found)
    return [f"{source}: {found}, {len(tensors)} tensors", *lines, f"wrote {out}"]


def _refuse_options(options: ConvertOptions, refused: set[str], found: str) -> None:
    given = [
        name for name in sorted(refused) if getattr(options, name.removeprefix("--")) is not None
    ]
    if given:
        raise ValueError(f"{', '.join(given)}: does not go with {found}; leave it out")


def _convert_stable_diffusion(
    state: SortedState, out: Path, options: ConvertOptions, found: str
) -> list[str]:
    _refuse_options(options, {"--ldm"}, found)
    models = convert_ldm(
        state, num_heads=options.num_heads, dtype=options.dtype, raw=options.weights == "raw"
    )
    missing = sorted(set(WEIGHT_FILES) - set(models))
    if missing:
        raise ConversionError(
            f"checkpoint: holds no {', '.join(missing)}; give a whole Stable Diffusion checkpoint"
        )
    with write_new_folder(out) as folder:
        write_ldm(folder, models, tokenizer=resolve_tokenizer(options.tokenizer))
    return state.account.describe()


def resolve_tokenizer(name: str | None) -> Path:
    """Return the folder of a CLIP tokenizer: a folder, one with ``tokenizer/``, or a hub id's.

    Raises:
        ConversionError: neither.
    """
    hub_id = name or DEFAULT_TOKENIZER
    folder = Path(hub_id).expanduser()
    for candidate in (folder, folder / "tokenizer"):
        if (candidate / "vocab.json").is_file():
            return candidate
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


def _convert_ldznet(
    state: SortedState, source: Path, out: Path, options: ConvertOptions
) -> list[str]:
    _refuse_options(options, {"--weights"}, "an LD-ZNet checkpoint, which says it itself")
    head = convert_head(state, num_heads=options.num_heads, dtype=options.dtype)
    what = type(head).__name__
    if head.feature_channels:
        what += f", blocks {list(head.feature_channels)}, {head.config['size_px']} px"
    state.account.notes["head"] = f"{what}; {state.account.notes['head']}"
    with write_new_folder(out) as folder:
        copied = _write_head_ldm(state, head, folder / LDM_FOLDER, options)
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
        plain = spec.model_dump(mode="json", exclude_none=True)
        plain["latents"]["model"] = place
        text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
        (folder / SPEC_FILE).write_text(text, encoding="utf-8")
    return [*state.account.describe(), *copied]


def _write_head_ldm(
    state: SortedState, head: UNetHead, folder: Path, options: ConvertOptions
) -> list[str]:
    """Write the LDM that a head was trained over; what its file lacks comes from ``--ldm``.

    The UNet's weights are the raw ones: see ``SortedState.select_weights``. Returns a line for each
    model that was copied.
    """
    models = convert_ldm(state, num_heads=options.num_heads, dtype=options.dtype, raw=True)
    wanted = (*_LATENT_MODELS, "unet") if "features" in head.reads else _LATENT_MODELS
    missing = [name for name in wanted if name not in models]
    if missing and options.ldm is None:
        raise ConversionError(
            f"checkpoint: holds no {', '.join(missing)} of the latent diffusion model that the "
            "head was trained over; give its diffusers folder by --ldm: sd-v1-4-full-ema.ckpt "
            "converted with --weights raw, which is what LD-ZNet's public code reads"
        )
    if options.ldm is not None:
        if not missing:
            raise ValueError(
                "--ldm: the checkpoint holds every part that its head reads; leave it out"
            )
        check_schedule(load_component(DDPMScheduler, options.ldm, "scheduler").alphas_cumprod)
        for name in list_model_files(options.ldm, missing):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(options.ldm / name, folder / name)
    tokenizer = options.tokenizer or (str(options.ldm) if options.ldm else None)
    write_ldm(folder, models, tokenizer=resolve_tokenizer(tokenizer))
    return [f"copied {name} from {options.ldm}" for name in missing]


def check_fit(head: UNetHead, ldm: Path) -> None:
    """Check that an LDM gives what a head reads: latents, text and features of its widths.

    Raises:
        ModelFilesError: the folder is no LDM of a family that is read.
        ConversionError: a width is another one.
    """
    frozen_unet = ("unet",) if head.feature_channels else ()
    configs = read_configs(ldm, need=("vae", "text_encoder", *frozen_unet))
    unet = head.unet.config
    pairs = {
        "latent channels": (unet.in_channels, configs["vae"].get("latent_channels", 4)),
        "text width": (read_text_width(unet), configs["text_encoder"].get("hidden_size")),
    }
    if head.feature_channels:
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


def _describe_inputs(head: UNetHead, ldm: Path) -> Spec:
    """Return the spec of what LD-ZNet's code feeds a head: PNVR et al., ICCV 2023, section 4."""
    size_px, features = int(head.config.get("size_px", PAPER_SIZE_PX)), None
    if head.feature_channels:
        features = FeaturesSpec(blocks=tuple(head.feature_channels), timesteps=PAPER_TIMESTEPS)
    latents = LatentsSpec(model=str(ldm), size=size_px, prompts=(PAPER_PROMPT,))
    return Spec(latents=latents, features=features)


def _move(layer: LayerSpec | None, place: str) -> LayerSpec | None:
    """Return the layer with another place of its model, which is not in its fingerprint."""
    return layer and layer.model_copy(update={"source": {**layer.source, "model": place}})
