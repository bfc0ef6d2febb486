"""Benchmarks of models that need no clock: parameters of heads, error of the storage forms.

Storage, in four steps: views of a corpus (the demo's scenes without one) -> posterior means and
prompt embeddings -> float32 features of some draws -> each storage form and back, its error added
up a block.

Shape suffixes: B batch, C channels, h/w a block's height and width.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from models.heads.registry import HEADS
from models.ldm.encoders import FeatureEncoder, LatentEncoder
from models.ldm.noise import draw_noise
from models.ldm.quantize import dequantize_int4, dequantize_int8, quantize_int4, quantize_int8
from models.ldm.sd14 import PAPER_LDZNET_PARAMETERS_M, SD14_UNET
from models.tiny.write import SD14_SIZE, TINY, write_tiny_ldm
from pipeline.corpus.members import group_members
from pipeline.corpus.source import open_source
from pipeline.corpus.tar import list_members
from pipeline.corpus.tasks import list_tasks
from pipeline.decode.pairs import View, build_views
from pipeline.decode.sample import Sample, decode_sample
from pipeline.scenes.scene import draw_scene, words, write_corpus
from pipeline.spec.blocks import SD14, build_empty_unet
from pipeline.spec.fetch_model import fetch_model
from pipeline.spec.fields import LatentsSpec

HEAD_VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    *((name, {}) for name in HEADS),
    ("ldznet", {"fusion": "concatenation"}),
)
PARTS = ("unet", "final", "pools", "added", "stem", "other")
TIMESTEPS = (300, 400, 500)
BATCH = 8
TINY_MODEL_SEED = 2
CALIBRATION_IMAGES = 16


@dataclass(frozen=True, slots=True)
class ParameterRow:
    """Parameters of one network: in all, and by part.

    ``unet`` is the LDM's UNet, ``added`` the attentions to features with their norms, or the
    convolutions after concatenation, ``other`` a probe's. ``paper_millions`` is the paper's figure,
    where the UNet is SD 1.4's, which the paper's is.
    """

    network: str
    total: int
    unet: int
    final: int
    pools: int
    added: int
    stem: int
    other: int
    paper_millions: int | None


def count_parameters(unet_config: Mapping[str, Any]) -> list[ParameterRow]:
    """Count the parameters of an LDM's UNet and of every head built from it, without weights.

    Raises:
        ValueError: a head does not take such a UNet.
    """
    unet = build_empty_unet(unet_config)
    is_sd14 = _architecture(unet) == _architecture(build_empty_unet(SD14_UNET))
    rows = [_parameter_row("LDM's UNet", {"unet": sum(p.numel() for p in unet.parameters())})]
    for name, options in HEAD_VARIANTS:
        with torch.device("meta"):
            head = HEADS[name].from_ldm_config(unet_config, **options)
        counts: dict[str, int] = {}
        for key, parameter in head.named_parameters():
            part = _part_of(key)
            counts[part] = counts.get(part, 0) + parameter.numel()
        paper = PAPER_LDZNET_PARAMETERS_M if is_sd14 and name == "ldznet" and not options else None
        rows.append(_parameter_row(", ".join([name, *options.values()]), counts, paper))
    return rows


def _architecture(unet: UNet2DConditionModel) -> str:
    """Return a UNet's config with diffusers' defaults, but for what changes no layer."""
    kept = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    kept.pop("sample_size", None)
    return json.dumps(kept, sort_keys=True)


def _part_of(key: str) -> str:
    if any(f".{name}." in key for name in ("attn3", "norm_sd", "merge")):
        return "added"
    first = key.split(".")[0]
    return first if first in PARTS else "other"


def _parameter_row(
    network: str, counts: Mapping[str, int], paper_millions: int | None = None
) -> ParameterRow:
    return ParameterRow(
        network=network,
        total=sum(counts.values()),
        **{part: counts.get(part, 0) for part in PARTS},
        paper_millions=paper_millions,
    )


@dataclass(frozen=True, slots=True)
class StorageRow:
    """Error of one storage form for one block, over all features taken.

    ``relative_rms`` is rms(x - x') / rms(x); ``relative_max`` is max|x - x'| / max|x|.
    """

    block: int
    form: str
    draw_bytes: int
    relative_rms: float
    relative_max: float


@dataclass(slots=True)
class _Error:
    num_bytes: int = 0
    squared_error: float = 0.0
    squared: float = 0.0
    largest_error: float = 0.0
    largest: float = 0.0

    def add(self, feature: Tensor, restored: Tensor, num_bytes: int) -> None:
        error = (restored - feature).double()
        self.num_bytes = num_bytes // len(feature)
        self.squared_error += float(error.square().sum())
        self.squared += float(feature.double().square().sum())
        self.largest_error = max(self.largest_error, float(error.abs().max()))
        self.largest = max(self.largest, float(feature.abs().max()))


def _float16(feature: Tensor) -> tuple[Tensor, int]:
    half = feature.half()
    return half.float(), half.nbytes


def _int8(feature: Tensor) -> tuple[Tensor, int]:
    values, scale = quantize_int8(feature)
    return dequantize_int8(values, scale), values.nbytes + scale.nbytes


def _int4(feature: Tensor) -> tuple[Tensor, int]:
    packed, scale = quantize_int4(feature)
    restored = dequantize_int4(packed, scale, shape=tuple(feature.shape))
    return restored, packed.nbytes + scale.nbytes


FORMS: dict[str, Callable[[Tensor], tuple[Tensor, int]]] = {
    "float16": _float16,
    "int8": _int8,
    "int4": _int4,
}
"""Form's name to a function: feature (B, C, h, w) float32 to what is read back, and its bytes."""


@dataclass(slots=True)
class StorageErrors:
    """Adds up the error of every form, by block."""

    errors: dict[tuple[int, str], _Error] = field(default_factory=dict)

    def add(self, features: Mapping[int, Tensor]) -> None:
        """Add features (B, C, h, w) float32, by block number."""
        for number, feature in features.items():
            for form, store in FORMS.items():
                restored, num_bytes = store(feature)
                self.errors.setdefault((number, form), _Error()).add(feature, restored, num_bytes)

    def rows(self) -> list[StorageRow]:
        """Return a row a block and form."""
        return [
            StorageRow(
                block=number,
                form=form,
                draw_bytes=error.num_bytes,
                relative_rms=(error.squared_error / error.squared) ** 0.5,
                relative_max=error.largest_error / error.largest,
            )
            for (number, form), error in sorted(self.errors.items(), key=lambda item: item[0][0])
        ]


def measure_storage(
    model: Path, views: Sequence[View], *, blocks: Sequence[int], seed: int = 0
) -> list[StorageRow]:
    """Measure the error of each storage form against float32 features of some views.

    A view is encoded with the prompt of its first pair, once at each of ``TIMESTEPS``, from the
    posterior mean and the embedding in float32.

    Raises:
        ValueError: no views, or the model has not these blocks.
    """
    if not views:
        raise ValueError("bench storage: expected at least one view, got none")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    latents = LatentEncoder.from_pretrained(model, device=device)
    encoder = FeatureEncoder.from_pretrained(model, blocks=blocks, device=device)
    errors = StorageErrors()
    for start in range(0, len(views), BATCH):
        some = views[start : start + BATCH]
        images = torch.from_numpy(np.stack([view.image for view in some]))
        mean, _ = latents.encode_image(images)
        text = latents.encode_text([view.pairs[0].prompt for view in some])
        for draw, timestep in enumerate(TIMESTEPS):
            noise = [
                draw_noise(
                    tuple(mean.shape[1:]),
                    seed=seed,
                    key=view.source.key,
                    view=view.number,
                    draw=draw,
                )
                for view in some
            ]
            timesteps = torch.full((len(some),), timestep)
            latent = mean * latents.scaling_factor
            errors.add(encoder.encode(latent, torch.stack(noise), timesteps, *text))
    return errors.rows()


def read_views(patterns: Sequence[str], spec: LatentsSpec, *, num: int) -> list[View]:
    """Read the first ``num`` views of a corpus, as evenly from its tars as they come.

    Raises:
        CorpusError: a pattern matches nothing.
        DamagedTarError: a tar's framing is broken.
    """
    tasks = list_tasks(patterns)
    share = -(-num // len(tasks))
    views: list[View] = []
    for task in tasks:
        with open_source(task) as (file, _):
            groups, _ = group_members(list_members(file, num_bytes=task.num_bytes))
            samples = (decode_sample(file, members) for members in groups)
            views += islice(_list_views(samples, spec), min(share, num - len(views)))
    return views


def _list_views(samples: Iterator[Any], spec: LatentsSpec) -> Iterator[View]:
    for sample in samples:
        if isinstance(sample, Sample):
            yield from build_views(sample, spec)[0]


def write_demo_model(folder: Path, *, size_px: int) -> None:
    """Write a tiny LDM: real classes at reduced width, random weights."""
    write_random_model(folder, sd14=False, size_px=size_px)


def write_random_model(folder: Path, *, sd14: bool, size_px: int) -> None:
    """Write an LDM with random weights, tiny or of SD 1.4's size; the latter takes 4.3 GB."""
    images = [
        draw_scene(seed=0, split="train", index=index, size_px=size_px).image
        for index in range(CALIBRATION_IMAGES)
    ]
    calibration = torch.from_numpy(np.stack(images))
    write_tiny_ldm(
        folder,
        words=words(),
        seed=TINY_MODEL_SEED,
        calibration_BHWC=None if sd14 else calibration,
        architecture=SD14_SIZE if sd14 else TINY,
    )


def load_unet(model: str | None) -> UNet2DConditionModel:
    """Load a diffusers folder's UNet; None is a tiny one, ``sd14`` SD 1.4's, both random."""
    if model == SD14:
        torch.manual_seed(0)
        return UNet2DConditionModel.from_config(dict(SD14_UNET))
    if model is not None:
        folder = fetch_model(model)
        return UNet2DConditionModel.from_pretrained(folder, subfolder="unet", use_safetensors=True)
    with tempfile.TemporaryDirectory(prefix="ldznet-bench-") as name:
        write_demo_model(Path(name), size_px=128)
        return UNet2DConditionModel.from_pretrained(name, subfolder="unet", use_safetensors=True)


def write_demo_scenes(folder: Path, *, num: int, size_px: int) -> list[str]:
    """Write the demo's first ``num`` validation scenes; return the corpus pattern."""
    write_corpus(folder, split="val", num_images=num, images_per_tar=num, size_px=size_px)
    return [str(folder / "*.tar")]
