"""From a decoded sample to its views and pairs, as the latents spec says."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from models.noise import draw_integer
from pipeline.samples import Reject, RejectReason, Sample
from pipeline.spec import LatentsSpec
from pipeline.views import Box, centre_box, cut_image, cut_mask, phrase_box, whole_box

# index.parquet: a row a pair, in the order of the pair arrays.
INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("view", pa.int32()),  # number of the view among its image's
        ("flipped", pa.bool_()),
        ("phrase", pa.string()),
        ("prompt", pa.string()),
        ("latent_row", pa.int64()),  # in latent_mean, latent_logvar, image
        ("text_row", pa.int64()),  # in text
        ("box_left", pa.int32()),  # the view's crop in source pixels
        ("box_top", pa.int32()),
        ("box_right", pa.int32()),
        ("box_bottom", pa.int32()),
        ("source_width", pa.int32()),
        ("source_height", pa.int32()),
        ("mask_area", pa.float32()),  # share of the view, (0, 1]
        ("image_sha256", pa.string()),  # of the source image's bytes
    ]
)
REJECTS_SCHEMA = pa.schema(
    [
        ("name", pa.string()),  # of the sample or member; for a pair "key: phrase"
        ("level", pa.string()),  # sample, member or pair
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)


@dataclass(frozen=True)
class Pair:
    """A phrase of a view, with its mask (size, size) uint8 of 0 and 1."""

    phrase: str
    prompt: str
    mask: np.ndarray


@dataclass(frozen=True, slots=True)
class SourceImage:
    """What the index keeps of a view's source: its sample's key, its size in pixels, its digest."""

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


def build_views(sample: Sample, spec: LatentsSpec) -> tuple[list[View], list[Reject]]:
    """Cut a sample into views with pairs; a phrase whose mask lies outside its view is rejected.

    Views are numbered 0, 1, … an image: each crop, and with ``flip`` its mirror image after it.
    """
    views: list[View] = []
    rejects: list[Reject] = []
    height, width = sample.image.shape[:2]
    source = SourceImage(sample.key, width, height, sample.image_sha256)
    for number, (box, phrases) in enumerate(_boxes(sample, spec)):
        for flipped in (False, True) if spec.flip else (False,):
            view_number = 2 * number + flipped if spec.flip else number
            pairs = []
            for index in phrases:
                mask = cut_mask(sample.masks[index], box, size=spec.size, flip=flipped)
                phrase = sample.phrases[index]
                if mask.any():
                    prompt = _prompt(sample, spec, index, view_number)
                    pairs.append(Pair(phrase, prompt, mask))
                elif not flipped:
                    rejects.append(_outside(sample, phrase, view_number, box))
            if pairs:
                image = cut_image(sample.image, box, size=spec.size, flip=flipped)
                views.append(View(source, view_number, flipped, box, image, tuple(pairs)))
    return views, rejects


def _boxes(sample: Sample, spec: LatentsSpec) -> Iterator[tuple[Box, range | tuple[int, ...]]]:
    height, width = sample.image.shape[:2]
    if spec.crop != "phrase":
        box = centre_box(width, height) if spec.crop == "center" else whole_box(width, height)
        yield box, range(len(sample.phrases))
        return
    for index, mask in enumerate(sample.masks):
        for view in range(spec.views):
            number = index * spec.views + view

            def draw(draw: int, low: int, high: int, number: int = number) -> int:
                return draw_integer(
                    low,
                    high,
                    purpose="crop",
                    seed=spec.seed,
                    key=sample.key,
                    view=number,
                    draw=draw,
                )

            yield phrase_box(mask, draw), (index,)


def _prompt(sample: Sample, spec: LatentsSpec, index: int, view: int) -> str:
    chosen = 0
    if len(spec.prompts) > 1:
        chosen = draw_integer(
            0,
            len(spec.prompts),
            purpose="prompt",
            seed=spec.seed,
            key=sample.key,
            view=view,
            draw=index,
        )
    return spec.prompts[chosen].replace("{}", sample.phrases[index])


def _outside(sample: Sample, phrase: str, view: int, box: Box) -> Reject:
    return Reject(
        name=f"{sample.key}: {phrase}",
        level="pair",
        reason=RejectReason.OUTSIDE_VIEW,
        detail=f"no pixel of the mask falls into view {view}, {box}",
    )


def index_rows(
    view: View, *, latent_row: int, text_rows: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Return a view's rows of ``index.parquet``."""
    return [
        {
            "key": view.source.key,
            "view": view.number,
            "flipped": view.flipped,
            "phrase": pair.phrase,
            "prompt": pair.prompt,
            "latent_row": latent_row,
            "text_row": text_rows[pair.prompt],
            "box_left": view.box.left,
            "box_top": view.box.top,
            "box_right": view.box.right,
            "box_bottom": view.box.bottom,
            "source_width": view.source.width,
            "source_height": view.source.height,
            "mask_area": float(pair.mask.mean()),
            "image_sha256": view.source.sha256,
        }
        for pair in view.pairs
    ]


def rejects_table(rejects: Iterable[Reject]) -> pa.Table:
    """Return ``rejects.parquet`` as a table."""
    rows = [
        {"name": r.name, "level": r.level, "reason": str(r.reason), "detail": r.detail}
        for r in rejects
    ]
    return pa.Table.from_pylist(rows, schema=REJECTS_SCHEMA)


def digest_pairs(index: pa.Table) -> str:
    """Return SHA-256 (hex) over what the pairs are, in order: two layers' rows agree or not."""
    columns = index.select(["key", "view", "flipped", "phrase", "prompt"]).to_pydict()
    digest = hashlib.sha256()
    for row in zip(*columns.values(), strict=True):
        digest.update(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()
