"""Builds views and pairs from a sample's cuts, and the rows and rejects that a store keeps."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.corpus.members import Reject, RejectReason
from pipeline.corpus.text import SampleText
from pipeline.decode.color import UNUSABLE
from pipeline.decode.views import (
    MAX_VIEW_PX,
    Box,
    Cut,
    Cutting,
    SourceImage,
    ViewPixels,
    choose_prompt,
    plan_views,
)
from pipeline.spec.fields import LatentsSpec
from pipeline.store.layout import EMPTY_PROMPT, REJECTS_SCHEMA

MAX_SCALE = 4.0  # pixels of a view for one of the source, above which views are counted


@dataclass(frozen=True)
class Pair:
    """A phrase of a view, with its mask (size, size) uint8 of 0 and 1 where it has one.

    ``phrase`` is None for an image without any. ``instance`` numbers the equal phrases of a sample
    from 0. ``kept`` are the values of ``keep_json``, in its order.
    """

    phrase: str | None
    prompt: str
    mask: np.ndarray | None = None
    instance: int = 0
    negative: bool = False
    kept: tuple[str | None, ...] = ()


@dataclass(frozen=True)
class View:
    """One crop of an image: (size, size, 3) uint8, and the pairs that read it.

    ``ignore`` (size, size) uint8 is 1 where neither loss nor metrics count, None without a region.
    """

    source: SourceImage
    number: int
    flipped: bool
    box: Box
    image: np.ndarray
    pairs: tuple[Pair, ...]
    ignore: np.ndarray | None = None

    @property
    def masks(self) -> list[np.ndarray]:
        """The masks of its pairs that have one, in order."""
        return [pair.mask for pair in self.pairs if pair.mask is not None]

    @property
    def num_bytes(self) -> int:
        """Bytes of its pixels."""
        ignore = [] if self.ignore is None else [self.ignore]
        return sum(pixels.nbytes for pixels in (self.image, *self.masks, *ignore))


def describe_cutting(spec: LatentsSpec) -> Cutting:
    """Return the fields of the spec that decide a sample's views."""
    return Cutting(
        *(spec.size, spec.crop, spec.views, spec.flip, len(spec.prompts), spec.seed),
        *(spec.orientation, spec.color),
    )


def build_views(
    cuts: Sequence[Cut],
    pixels: Iterable[ViewPixels],
    source: SourceImage,
    text: SampleText,
    spec: LatentsSpec,
) -> tuple[list[View], list[Reject]]:
    """Join a sample's planned views with its text and ``pixels``.

    The text's own negatives go to the first crop that exists. Also returns a pair-level reject for
    each cut that shows nothing of its mask.
    """
    views: list[View] = []
    cutting, pairs_of = describe_cutting(spec), PairBuilder(source.key, text, spec)
    plans = plan_views(cuts, cutting, width=source.width, height=source.height)
    for plan, (image, masks, ignore) in zip(plans, pixels, strict=True):
        if cuts:
            numbers = [cuts[place].phrase for place in plan.cuts]
            found = zip(numbers, plan.prompts, masks, strict=True)
            pairs = [pairs_of.build(number, chosen, mask) for number, chosen, mask in found]
        else:
            pairs = pairs_of.build_without_masks(plan.number)
        if len(views) < cutting.num_mirrored:
            pairs += pairs_of.build_negatives(text.negatives, plan.number)
        views.append(View(source, plan.number, plan.flipped, plan.box, image, tuple(pairs), ignore))
    rejects = []
    for place, cut in enumerate(cuts):
        if not cut.shown:
            number = cutting.num_mirrored * place if cutting.crop == "phrase" else 0
            phrase = text.phrases[cut.phrase]
            reason, detail = _explain(cut, f"view {number}, {cut.box}", spec.size)
            name = f"{source.key}: {phrase}"
            rejects.append(Reject(name, "pair", reason, detail, phrase=phrase))
    return views, rejects


class PairBuilder:
    """Builds the pairs of one sample's views."""

    def __init__(self, key: str, text: SampleText, spec: LatentsSpec) -> None:
        self._key, self._text, self._spec = key, text, spec
        self._cutting = describe_cutting(spec)
        phrases = text.phrases
        self._instances = [phrases[:i].count(phrase) for i, phrase in enumerate(phrases)]

    def build(self, number: int, chosen: int, mask: np.ndarray | None) -> Pair:
        """Return the pair of the phrase with a number, by its prompt's number."""
        phrase = self._text.phrases[number]
        kept = self._keep(number)
        return Pair(phrase, self._fill(chosen, phrase), mask, self._instances[number], kept=kept)

    def build_without_masks(self, view: int) -> list[Pair]:
        """Return the pairs of a view of a sample without masks, also of one without phrases."""
        text = self._text
        if not text.phrases and not text.negatives:
            return [Pair(None, EMPTY_PROMPT, kept=self._keep(None))]
        numbers = range(len(text.phrases))
        return [
            self.build(i, choose_prompt(self._cutting, self._key, view, i), None) for i in numbers
        ]

    def build_negatives(self, phrases: Sequence[str], view: int, *, first: int = 0) -> list[Pair]:
        """Return the negative pairs of a view; ``first`` is the number of the first negative."""
        pairs, kept = [], self._keep(None)
        for i, phrase in enumerate(phrases, len(self._text.phrases) + first):
            chosen = choose_prompt(self._cutting, self._key, view, i)
            prompt = self._fill(chosen, phrase)
            pairs.append(Pair(phrase, prompt, negative=True, kept=kept))
        return pairs

    def _fill(self, chosen: int, phrase: str) -> str:
        return self._spec.prompts[chosen].replace("{}", phrase)

    def _keep(self, number: int | None) -> tuple[str | None, ...]:
        return tuple(self._text.find_kept(name, number) for name in self._spec.keep_json)


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
    ignore_row: int = 0,
    cut_prompts: Collection[str] = (),
    keep_json: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Return a view's rows of ``index.parquet``.

    ``mask_row`` is the row of its first mask, ``ignore_row`` that of its ignore region if it has
    one. A prompt that is not in ``text_rows`` has no row. ``cut_prompts`` are those that the
    tokenizer cuts.
    """
    box = view.box
    scale = len(view.image) / min(box.right - box.left, box.bottom - box.top)
    mask_rows = count(mask_row)
    return [
        {
            "key": view.source.key,
            "view": view.number,
            "flipped": view.flipped,
            "latent_row": latent_row,
            **{f"box_{side}": at for side, at in box._asdict().items()},
            "source_width": view.source.width,
            "source_height": view.source.height,
            "mask_area": None if pair.mask is None else float(pair.mask.mean()),
            "image_sha256": view.source.sha256,
            "mask_row": None if pair.mask is None else next(mask_rows),
            "ignore_row": None if view.ignore is None else ignore_row,
            "orientation": view.source.orientation,
            "scale": scale,
            "color_profile": view.source.color_profile,
            **_pair_columns(pair, text_rows, cut_prompts, keep_json),
        }
        for pair in view.pairs
    ]


def negative_row(
    row: Mapping[str, Any],
    pair: Pair,
    *,
    text_rows: Mapping[str, int],
    cut_prompts: Collection[str],
    keep_json: Sequence[str],
) -> dict[str, Any]:
    """Return the row of a negative pair, by that of another pair of its view."""
    own = _pair_columns(pair, text_rows, cut_prompts, keep_json)
    return {**row, "mask_area": None, "mask_row": None, **own}


def _pair_columns(
    pair: Pair,
    text_rows: Mapping[str, int],
    cut_prompts: Collection[str],
    keep_json: Sequence[str],
) -> dict[str, Any]:
    """Return the columns of a pair's row that neither its view nor its mask decides."""
    return {
        "phrase": pair.phrase,
        "prompt": pair.prompt,
        "text_row": text_rows.get(pair.prompt),
        "negative": pair.negative,
        "instance": pair.instance,
        "prompt_cut": pair.prompt in cut_prompts,
        **dict(zip(keep_json, pair.kept, strict=True)),
    }


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
