"""What a store's layers are: the spec a user writes, and the fingerprint of what it means.

A spec file has everything that changes a stored value. Resolving it against the model's files
gives one ``LayerSpec`` a layer; its fingerprint names the layer's folder. Names and places (the
model's path) are kept beside, so that a moved model folder is still the same layer.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

SCHEMA_VERSION = 1
NUM_TIMESTEPS = 1000
LATENT_DOWNSCALE = 8
GIB = 2**30
DEFAULT_SPLIT_BYTES = GIB  # 20,000 images of 50 KB: what a lost worker's retry costs at most
SD_SCALING_FACTOR = 0.18215  # what AutoencoderKL takes where its config says nothing

Model = TypeVar("Model", bound=BaseModel)
Compute = Literal["float32", "bfloat16", "float16"]

# How far two encodings of one row may lie apart: |a - b| <= relative * max|row|, over other batch
# sizes, thread counts and devices of one kind. float16 storage rounds by 2**-11 = 4.9e-4 alone;
# the arithmetic's own difference is about 1e-5 in float32 and the unit roundoff times the depth
# in the half precisions.
TOLERANCES: dict[str, float] = {"float32": 2e-3, "float16": 2e-2, "bfloat16": 1e-1}
# One int8 step is 1/127 of its channel's largest value, and rounding may fall either way.
INT8_TOLERANCE = 1.01 / 127


class SpecError(ValueError):
    """A spec that cannot be, or that does not match what it is used with."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class UniformTimesteps(_Frozen):
    """``draws`` timesteps a view, each uniform in [low, high), as the paper trains."""

    low: int = Field(ge=0, lt=NUM_TIMESTEPS)
    high: int = Field(gt=0, le=NUM_TIMESTEPS)
    draws: int = Field(ge=1, le=64)

    @model_validator(mode="after")
    def _ordered(self) -> "UniformTimesteps":
        if self.low >= self.high:
            raise ValueError(f"low must be below high, got low {self.low}, high {self.high}")
        return self


class LatentsSpec(_Frozen):
    """How images become latents, and phrases text embeddings."""

    model: str  # diffusers folder, hub id, or fsspec URL of a diffusers folder
    revision: str | None = None  # of a hub id
    variant: str | None = None  # of the weights' files, such as fp16
    size: int = Field(default=384, ge=64, le=4096)  # px, side of a view
    crop: Literal["center", "resize", "phrase"] = "center"
    views: int = Field(default=1, ge=1, le=64)  # crops a pair, with crop: phrase
    flip: bool = False  # adds each view mirrored; wrong for phrases that say left or right
    prompts: tuple[str, ...] = ("a photo of a {}.",)  # one a pair, drawn where there are several
    keep_image: bool = False  # stores the view's RGB too, which RGBNet reads
    compute: Compute = "float32"
    seed: int = 0  # of random crops and of the prompts' choice

    @field_validator("size")
    @classmethod
    def _size(cls, size: int) -> int:
        if size % 64:
            raise ValueError(f"size must be a multiple of 64 px (f8 VAE, 3 halvings), got {size}")
        return size

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

    @model_validator(mode="after")
    def _views(self) -> "LatentsSpec":
        if self.views > 1 and self.crop != "phrase":
            raise ValueError(
                f"views must be 1 with crop: {self.crop} (every view would be the same), "
                f"got {self.views}; use crop: phrase for several random squares"
            )
        return self


class FeaturesSpec(_Frozen):
    """Which of the UNet's features are taken, where, and how they are stored."""

    blocks: tuple[int, ...] = (6, 7, 8, 9, 10)
    timesteps: tuple[int, ...] | UniformTimesteps = (300, 400, 500)
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
    def _timesteps(
        cls, timesteps: tuple[int, ...] | UniformTimesteps
    ) -> tuple[int, ...] | UniformTimesteps:
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


class Spec(_Frozen):
    """A spec file: a latents layer and, where asked for, a features layer over it."""

    latents: LatentsSpec
    features: FeaturesSpec | None = None


class LayerSpec(_Frozen):
    """A layer's ``spec.json``: what its values depend on, and what reading it needs.

    ``split_bytes`` of a latents layer is a rule of its task ids: a longer tar is
    ceil(its bytes / split_bytes) tasks. It changes no value and is not in the fingerprint; whoever
    creates the layer chooses it, and every later run takes it from there, or a tar would be encoded
    twice under two splits. None never splits.
    """

    schema_version: int = SCHEMA_VERSION
    kind: Literal["latents", "features"]
    fingerprint: str = Field(pattern=r"^[0-9a-f]{16}$")
    canonical: dict[str, Any]  # what the fingerprint is taken over
    source: dict[str, Any]  # model name, revision, variant: where it came from, not what it is
    tolerance: float  # |a - b| <= tolerance * max|row| between two encodings of a row
    split_bytes: int | None = Field(default=None, ge=1)

    @property
    def folder(self) -> str:
        """The layer's folder in the store."""
        return f"{self.kind}-{self.fingerprint}"

    @property
    def latents(self) -> LatentsSpec:
        """The latents section that this layer was made from."""
        if self.kind != "latents":
            raise SpecError(f"{self.folder}: expected a latents layer")
        return LatentsSpec(**self._section(), **self.source)

    @property
    def scaling_factor(self) -> float:
        """What a stored latent is multiplied by before a UNet or a head sees it."""
        return float(self.canonical["scaling_factor"])

    @property
    def pooled_width(self) -> int | None:
        """Width of a row of ``text_pooled``, None where the layer's model has none (SD 1, 2)."""
        width = self.canonical.get("text_pooled")
        return None if width is None else int(width)

    @property
    def text_arrays(self) -> tuple[str, ...]:
        """Names of the arrays with a row a prompt: ``text``, and SDXL's ``text_pooled``."""
        return ("text",) if self.pooled_width is None else ("text", "text_pooled")

    @property
    def zero_empty_prompt(self) -> bool:
        """Whether row 0 of the text arrays, the empty prompt, is zeros."""
        return bool(self.canonical.get("zero_empty_prompt", False))

    @property
    def latents_folder(self) -> str:
        """The folder of the latents layer whose rows this features layer has."""
        return f"latents-{self.canonical['latents']}"

    @property
    def features(self) -> FeaturesSpec:
        """The features section that this layer was made from."""
        if self.kind != "features":
            raise SpecError(f"{self.folder}: expected a features layer")
        return FeaturesSpec(**self._section())

    def _section(self) -> dict[str, Any]:
        return dict(self.canonical["section"])

    @model_validator(mode="after")
    def _consistent(self) -> "LayerSpec":
        expected = fingerprint(self.canonical)
        if self.fingerprint != expected:
            raise ValueError(
                f"fingerprint must be {expected}, that of the canonical spec, "
                f"got {self.fingerprint}: the file was edited or damaged"
            )
        if set(self.source) != {"model", "revision", "variant"} or "section" not in self.canonical:
            raise ValueError("source or section is not a layer's: the file was edited or damaged")
        _ = self.latents if self.kind == "latents" else self.features  # raises where not valid
        return self


def fingerprint(canonical: Mapping[str, Any]) -> str:
    """Return the first 16 hex digits of SHA-256 over the canonical spec's JSON."""
    text = json.dumps(canonical, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class _PlainLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which by itself lets the last of two equal keys win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Make a mapping; refuse a key given twice."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    what = f"the key {key.value!r} is given twice"
                    raise yaml.constructor.ConstructorError(None, None, what, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_yaml(path: Path, kind: type[Model]) -> Model:
    """Read a YAML file into a validated model.

    Raises:
        SpecError: no such file, not YAML, or not a valid spec; says which field and why.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read: {error}") from error
    return parse_yaml(text, kind, where=str(path))


def parse_yaml(text: str, kind: type[Model], *, where: str) -> Model:
    """Read YAML text into a validated model; ``where`` names it in errors."""
    try:
        refused = [t for t in yaml.scan(text) if isinstance(t, yaml.AliasToken | yaml.TagToken)]
        data = None if refused else yaml.load(text, Loader=_PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no such date
        raise SpecError(f"{where}: is not plain YAML: {error}") from error
    if refused:
        line = refused[0].start_mark.line + 1
        raise SpecError(
            f"{where}: line {line}: aliases (*name) and tags (!name) are not read; "
            "write the value out"
        )
    if not isinstance(data, dict):
        raise SpecError(f"{where}: expected a mapping of fields, got {type(data).__name__}")
    return validate(data, kind, where=where)


def validate(data: Mapping[str, Any], kind: type[Model], *, where: str) -> Model:
    """Make a model from plain data, with one readable line a fault.

    Raises:
        SpecError: with the field, the reason and what was got.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        faults = []
        for fault in error.errors(include_url=False):
            field = ".".join(str(part) for part in fault["loc"]) or "(whole)"
            said = fault["msg"].removeprefix("Value error, ")
            if fault["type"] == "extra_forbidden":
                said = f"no such field{_list_fields(kind, fault['loc'][:-1])}"
            says_it = ", got " in said or fault["type"] == "extra_forbidden"
            got = "" if says_it else f" (got {_shorten(fault['input'])})"
            faults.append(f"  {field}: {said}{got}")
        raise SpecError(f"{where}: is not a valid {kind.__name__}:\n" + "\n".join(faults)) from None


def _list_fields(kind: type[BaseModel], where: Sequence[str | int]) -> str:
    """``; there are a, b, c`` of the section at ``where`` in a model, or nothing for a union's."""
    section: Any = kind
    for part in where:
        field = section.model_fields.get(part) if isinstance(part, str) else None
        options = [] if field is None else [field.annotation, *get_args(field.annotation)]
        found = [x for x in options if isinstance(x, type) and issubclass(x, BaseModel)]
        if not found:
            return ""
        section = found[0]
    return f"; there are {', '.join(section.model_fields)}"


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
