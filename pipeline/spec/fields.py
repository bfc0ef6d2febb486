"""The spec file that a user writes: everything that changes a value stored in a layer.

``build_layers`` makes a ``layer.LayerSpec`` of each of its sections.
"""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.base.yaml import FrozenModel

NUM_TIMESTEPS = 1000
GIB = 2**30
DEFAULT_SPLIT_BYTES = GIB  # 20,000 images of 50 KB: what one more try of a task costs at most
SD_SCALING_FACTOR = 0.18215  # AutoencoderKL's default
# How far two encodings of one row may lie apart: |a - b| <= tolerance * max|row|, over other batch
# sizes, thread counts and devices of one kind. float16 storage alone rounds by 2**-11 = 4.9e-4;
# arithmetic differs by about 1e-5 in float32 and by the unit roundoff times the depth in the half
# precisions.
TOLERANCES: dict[str, float] = {"float32": 2e-3, "float16": 2e-2, "bfloat16": 1e-1}
# One int8 step is 1/127 of its channel's largest value, and rounding may go either way.
INT8_TOLERANCE = 1.01 / 127
INDEX_COLUMNS = (  # of store.layout.INDEX_SCHEMA, in its order
    *("key", "view", "flipped", "phrase", "prompt", "latent_row", "text_row"),
    *("box_left", "box_top", "box_right", "box_bottom", "source_width", "source_height"),
    *("mask_area", "image_sha256", "mask_row", "negative", "ignore_row", "instance"),
    *("prompt_cut", "orientation", "scale", "color_profile"),
)
Compute = Literal["float32", "bfloat16", "float16"]


class UniformTimesteps(FrozenModel):
    """``draws`` timesteps a view, each uniform in [low, high), as in the paper's training."""

    low: int = Field(ge=0, lt=NUM_TIMESTEPS)
    high: int = Field(gt=0, le=NUM_TIMESTEPS)
    draws: int = Field(ge=1, le=64)

    @model_validator(mode="after")
    def _ordered(self) -> "UniformTimesteps":
        if self.low >= self.high:
            raise ValueError(f"low must be below high, got low {self.low}, high {self.high}")
        return self


Timesteps = tuple[int, ...] | UniformTimesteps


class LatentsSpec(FrozenModel):
    """How images are encoded to latents and phrases to text embeddings."""

    model: str  # diffusers folder, hub id, or fsspec URL of a diffusers folder
    revision: str | None = None  # of a hub id
    variant: str | None = None  # of the weights' files, such as fp16
    # Side of a view, px; the VAE makes it 8 times smaller, and the UNet halves that 3 times.
    size: int = Field(default=384, ge=64, le=4096, multiple_of=64)
    crop: Literal["center", "resize", "phrase"] = "center"
    views: int = Field(default=1, ge=1, le=64)  # crops a pair, with crop: phrase alone
    flip: bool = False  # adds each view mirrored; wrong for phrases that say left or right
    prompts: tuple[str, ...] = ("a photo of a {}.",)  # one a pair, drawn where there are several
    keep_image: bool = False  # stores the view's RGB too, which RGBNet reads
    # EXIF's turn; ignore: the pixels as they are stored, for masks that were drawn on those
    orientation: Literal["apply", "ignore"] = "apply"
    color: Literal["raw", "srgb"] = "raw"  # srgb: an embedded colour profile is converted
    # none: no prompt's embedding but the empty one's is stored (118 kB each at SD 1.4's size);
    # a features layer and heads make those that they need
    text: Literal["store", "none"] = "store"
    keep_json: tuple[str, ...] = ()  # keys of a sample's JSON that become columns of the index
    negatives: int = Field(default=0, ge=0, le=64)  # phrases a view that its image does not have
    compute: Compute = "float32"
    seed: int = 0  # of random crops and of the prompts' choice

    @field_validator("prompts")
    @classmethod
    def _prompts(cls, prompts: tuple[str, ...]) -> tuple[str, ...]:
        bad = [p for p in prompts if p.count("{}") != 1 or not p.isprintable()]
        if bad or not prompts:
            raise ValueError(
                "each prompt must hold {} once for the phrase, and no control character or lone "
                f"surrogate, got {bad or '[]'}"
            )
        return prompts

    @field_validator("keep_json")
    @classmethod
    def _keep_json(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) < len(names) or not all(name and name.isprintable() for name in names):
            raise ValueError(f"keep_json must be distinct printable names, got {list(names)}")
        if taken := [name for name in names if name in INDEX_COLUMNS]:
            raise ValueError(f"keep_json must not name columns that every index has, got {taken}")
        return names

    @model_validator(mode="after")
    def _views(self) -> "LatentsSpec":
        if self.views > 1 and self.crop != "phrase":
            raise ValueError(
                f"views must be 1 with crop: {self.crop} (every view would be the same), "
                f"got {self.views}; use crop: phrase for several random squares"
            )
        return self


class FeaturesSpec(FrozenModel):
    """Which features of the UNet are computed, at which timesteps, and how they are stored."""

    blocks: tuple[int, ...] = (6, 7, 8, 9, 10)
    timesteps: Timesteps = (300, 400, 500)
    condition: Literal["phrase", "empty"] = "phrase"
    storage: Literal["float16", "int8"] = "float16"
    compute: Compute = "float32"
    seed: int = 0  # of noise and of uniform timesteps

    @field_validator("blocks")
    @classmethod
    def _blocks(cls, blocks: tuple[int, ...]) -> tuple[int, ...]:
        if not blocks or min(blocks) < 1 or list(blocks) != sorted(set(blocks)):
            raise ValueError(
                f"blocks must be distinct numbers from 1, ascending, got {list(blocks)}"
            )
        return blocks

    @field_validator("timesteps")
    @classmethod
    def _timesteps(cls, timesteps: Timesteps) -> Timesteps:
        if isinstance(timesteps, tuple):
            bad = [t for t in timesteps if not 0 <= t < NUM_TIMESTEPS]
            if bad or not timesteps:
                raise ValueError(f"timesteps must be in [0, {NUM_TIMESTEPS}), got {bad or '[]'}")
        return timesteps

    @property
    def num_draws(self) -> int:
        """Draws a pair (or a view, with condition: empty)."""
        if isinstance(self.timesteps, UniformTimesteps):
            return self.timesteps.draws
        return len(self.timesteps)


# Fields that the first layers had not; every field that is added is one of them.
_YOUNG = {"orientation", "color", "text", "keep_json", "negatives"}


def dump_section(section: LatentsSpec | FeaturesSpec, *, without: set[str]) -> dict[str, Any]:
    """Return a section as it is in a layer's canonical spec, without some fields.

    A field that is younger than the first layers is there where it is not at its default: so a
    layer keeps its fingerprint, whatever fields come.
    """
    fields = type(section).model_fields
    young = fields.keys() & _YOUNG
    unset = {name for name in young if getattr(section, name) == fields[name].default}
    return section.model_dump(mode="json", exclude=without | unset)


class Spec(FrozenModel):
    """A spec file: a latents layer and, where asked for, a features layer over it."""

    latents: LatentsSpec
    features: FeaturesSpec | None = None
