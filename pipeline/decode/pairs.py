"""Builds views and pairs from a sample's cuts, and the rows and rejects that a store keeps."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.corpus.members import Reject, RejectReason
from pipeline.decode.views import Box, Cut, Cutting, plan_views
from pipeline.spec.fields import LatentsSpec
from pipeline.store.layout import REJECTS_SCHEMA


@dataclass(frozen=True)
class Pair:
    """A phrase of a view, with its mask (size, size) uint8 of 0 and 1."""

    phrase: str
    prompt: str
    mask: np.ndarray


@dataclass(frozen=True, slots=True)
class SourceImage:
    """A view's source in the index: its sample's key, its size in pixels, its digest in hex."""

    key: str
    width: int
    height: int
    sha256: str


@dataclass(frozen=True)
class View:
    """One crop of an image: (size, size, 3) uint8, and the pairs that read it."""

    source: SourceImage
    number: int
    flipped: bool
    box: Box
    image: np.ndarray
    pairs: tuple[Pair, ...]


def describe_cutting(spec: LatentsSpec) -> Cutting:
    """Return the fields of the spec that decide a sample's views."""
    return Cutting(spec.size, spec.crop, spec.views, spec.flip, len(spec.prompts), spec.seed)


def build_views(
    cuts: Sequence[Cut],
    pixels: Iterable[tuple[np.ndarray, Sequence[np.ndarray]]],
    source: SourceImage,
    phrases: Sequence[str],
    spec: LatentsSpec,
) -> tuple[list[View], list[Reject]]:
    """Join a sample's planned views with their texts and ``pixels``: an image, and a mask a pair.

    Also returns a pair-level reject for each cut that shows nothing of its mask.
    """
    views, cutting = [], describe_cutting(spec)
    for plan, (image, masks) in zip(plan_views(cuts, cutting), pixels, strict=True):
        pairs = []
        for place, chosen, mask in zip(plan.cuts, plan.prompts, masks, strict=True):
            phrase = phrases[cuts[place].phrase]
            pairs.append(Pair(phrase, spec.prompts[chosen].replace("{}", phrase), mask))
        views.append(View(source, plan.number, plan.flipped, plan.box, image, tuple(pairs)))
    rejects = []
    for place, cut in enumerate(cuts):
        if not cut.shown:
            number = cutting.num_mirrored * place if cutting.crop == "phrase" else 0
            detail = f"no pixel of the mask falls into view {number}, {cut.box}"
            phrase = phrases[cut.phrase]
            name = f"{source.key}: {phrase}"
            rejects.append(Reject(name, "pair", RejectReason.OUTSIDE_VIEW, detail, phrase=phrase))
    return views, rejects


def index_rows(
    view: View, *, latent_row: int, text_rows: Mapping[str, int], mask_row: int
) -> list[dict[str, Any]]:
    """Return a view's rows of ``index.parquet``; ``mask_row`` is that of its first pair."""
    return [
        {
            "key": view.source.key,
            "view": view.number,
            "flipped": view.flipped,
            "phrase": pair.phrase,
            "prompt": pair.prompt,
            "latent_row": latent_row,
            "text_row": text_rows[pair.prompt],
            **{f"box_{side}": at for side, at in view.box._asdict().items()},
            "source_width": view.source.width,
            "source_height": view.source.height,
            "mask_area": float(pair.mask.mean()),
            "image_sha256": view.source.sha256,
            "mask_row": mask_row + number,
            "negative": False,
        }
        for number, pair in enumerate(view.pairs)
    ]


def rejects_table(rejects: Iterable[Reject]) -> pa.Table:
    """Return ``rejects.parquet`` as a table."""
    columns = REJECTS_SCHEMA.names
    rows = [{name: getattr(reject, name) for name in columns} for reject in rejects]
    return pa.Table.from_pylist(rows, schema=REJECTS_SCHEMA)
