"""Builds views and pairs from a sample's cuts, and the rows and rejects that a store keeps."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.corpus.members import Reject, RejectReason
from pipeline.decode.color import UNUSABLE
from pipeline.decode.views import MAX_VIEW_PX, Box, Cut, Cutting, SourceImage, plan_views
from pipeline.spec.fields import LatentsSpec
from pipeline.store.layout import REJECTS_SCHEMA

MAX_SCALE = 4.0  # pixels of a view for one of the source, above which views are counted


@dataclass(frozen=True)
class Pair:
    """A phrase of a view, with its mask (size, size) uint8 of 0 and 1.

    ``instance`` numbers the equal phrases of a sample from 0.
    """

    phrase: str
    prompt: str
    mask: np.ndarray
    instance: int = 0


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
    return Cutting(
        *(spec.size, spec.crop, spec.views, spec.flip, len(spec.prompts), spec.seed),
        *(spec.orientation, spec.color),
    )


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
    instances = [phrases[:i].count(phrase) for i, phrase in enumerate(phrases)]
    for plan, (image, masks) in zip(plan_views(cuts, cutting), pixels, strict=True):
        pairs = []
        for place, chosen, mask in zip(plan.cuts, plan.prompts, masks, strict=True):
            number = cuts[place].phrase
            phrase = phrases[number]
            prompt = spec.prompts[chosen].replace("{}", phrase)
            pairs.append(Pair(phrase, prompt, mask, instances[number]))
        views.append(View(source, plan.number, plan.flipped, plan.box, image, tuple(pairs)))
    rejects = []
    for place, cut in enumerate(cuts):
        if not cut.shown:
            number = cutting.num_mirrored * place if cutting.crop == "phrase" else 0
            phrase = phrases[cut.phrase]
            reason, detail = _explain(cut, f"view {number}, {cut.box}", spec.size)
            name = f"{source.key}: {phrase}"
            rejects.append(Reject(name, "pair", reason, detail, phrase=phrase))
    return views, rejects


def _explain(cut: Cut, view: str, size: int) -> tuple[RejectReason, str]:
    """Return why a cut is not shown, and a line about it."""
    if not cut.needs_px:
        return RejectReason.OUTSIDE_VIEW, f"no pixel of the mask falls into {view}"
    advice = f"at size: {cut.needs_px} it is seen"
    if cut.needs_px > MAX_VIEW_PX:
        advice = f"no size up to {MAX_VIEW_PX} shows it"
    detail = (
        f"the mask lies in {view}, but is too thin for {size} px, between whose pixels it falls"
    )
    return RejectReason.TOO_THIN, f"{detail}; {advice}"


def index_rows(
    view: View,
    *,
    latent_row: int,
    text_rows: Mapping[str, int],
    mask_row: int,
    cut_prompts: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Return a view's rows of ``index.parquet``; ``mask_row`` is that of its first pair.

    ``cut_prompts`` are those that the tokenizer cuts.
    """
    box = view.box
    scale = len(view.image) / min(box.right - box.left, box.bottom - box.top)
    return [
        {
            "key": view.source.key,
            "view": view.number,
            "flipped": view.flipped,
            "phrase": pair.phrase,
            "prompt": pair.prompt,
            "latent_row": latent_row,
            "text_row": text_rows[pair.prompt],
            **{f"box_{side}": at for side, at in box._asdict().items()},
            "source_width": view.source.width,
            "source_height": view.source.height,
            "mask_area": float(pair.mask.mean()),
            "image_sha256": view.source.sha256,
            "mask_row": mask_row + number,
            "negative": False,
            "instance": pair.instance,
            "prompt_cut": pair.prompt in cut_prompts,
            "orientation": view.source.orientation,
            "scale": scale,
            "color_profile": view.source.color_profile,
        }
        for number, pair in enumerate(view.pairs)
    ]


def count_notes(rows: Sequence[Mapping[str, Any]], spec: LatentsSpec) -> dict[str, int]:
    """Count what rows of a task's index tell of peculiarities: by name, of those that it has.

    A profile counts unless its name says sRGB, in which images without one are taken to be.
    """

    def count_images(fits: Callable[[Mapping[str, Any]], bool]) -> int:
        return len({row["key"] for row in rows if fits(row)})

    def is_foreign(profile: str | None) -> bool:
        return profile not in (None, UNUSABLE) and "srgb" not in str(profile).lower()

    repeated = {(row["key"], row["phrase"]) for row in rows if row["instance"]}
    turns = spec.orientation == "apply"
    notes = {
        "cut_prompts": sum(row["prompt_cut"] for row in rows),
        "repeated_phrases": sum((row["key"], row["phrase"]) in repeated for row in rows),
        "enlarged_views": len({row["latent_row"] for row in rows if row["scale"] > MAX_SCALE}),
        "turned_images": count_images(lambda row: turns and row["orientation"] != 1),
        "profiled_images": count_images(lambda row: is_foreign(row["color_profile"])),
        "unusable_profiles": count_images(lambda row: row["color_profile"] == UNUSABLE),
    }
    return {name: number for name, number in notes.items() if number}


def rejects_table(rejects: Iterable[Reject]) -> pa.Table:
    """Return ``rejects.parquet`` as a table."""
    columns = REJECTS_SCHEMA.names
    rows = [{name: getattr(reject, name) for name in columns} for reject in rejects]
    return pa.Table.from_pylist(rows, schema=REJECTS_SCHEMA)
