"""A layer as a store keeps it: the spec with digests of its files, and its fingerprint."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from pipeline.base.yaml import SpecError
from pipeline.spec.fields import FeaturesSpec, LatentsSpec, _Frozen

SCHEMA_VERSION = 1


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
