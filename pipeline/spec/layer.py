"""A layer as a store holds it: spec, digests of the model's files, and fingerprint.

The fingerprint names the layer's folder. Where the model lies is kept beside it and is no part of
it, so that a moved model folder gives the same layer.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from pipeline.base.yaml import FrozenModel, SpecError
from pipeline.spec.fields import FeaturesSpec, LatentsSpec

SCHEMA_VERSION = 1


class LayerSpec(FrozenModel):
    """A layer's ``spec.json``: what its values depend on, and what reading it needs.

    ``split_bytes`` of a latents layer decides its task ids: a longer tar is
    ceil(its bytes / split_bytes) tasks; None never splits. It changes no value, but for negatives,
    which are drawn from a task's phrases, and is not in the fingerprint. The run that creates the
    layer chooses it and every later run takes it from there, or a tar would be encoded twice under
    two splits.
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
        """The spec's section of this latents layer."""
        if self.kind != "latents":
            raise SpecError(f"{self.folder}: expected a latents layer")
        return LatentsSpec(**self.canonical["section"], **self.source)

    @property
    def section(self) -> dict[str, Any]:
        """The spec's section of this layer with every field, also those left out at a default."""
        spec = self.latents if self.kind == "latents" else self.features
        return spec.model_dump(mode="json", exclude=set(self.source))

    @property
    def scaling_factor(self) -> float:
        """Factor by which a stored latent is multiplied before a UNet or a head reads it."""
        return float(self.canonical["scaling_factor"])

    @property
    def pooled_width(self) -> int | None:
        """Width of a row of ``text_pooled``, None where the layer's model has none (SD 1, 2)."""
        width = self.canonical.get("text_pooled")
        return None if width is None else int(width)

    @property
    def text_arrays(self) -> tuple[str, ...]:
        """Arrays with a row a prompt: ``text`` and, for SDXL, ``text_pooled``."""
        return ("text",) if self.pooled_width is None else ("text", "text_pooled")

    @property
    def zero_empty_prompt(self) -> bool:
        """Whether row 0 of the text arrays, the empty prompt, is zeros."""
        return bool(self.canonical.get("zero_empty_prompt", False))

    @property
    def latents_folder(self) -> str:
        """The folder of the latents layer under this features layer."""
        return f"latents-{self.canonical['latents']}"

    @property
    def features(self) -> FeaturesSpec:
        """The spec's section of this features layer."""
        if self.kind != "features":
            raise SpecError(f"{self.folder}: expected a features layer")
        return FeaturesSpec(**self.canonical["section"])

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
