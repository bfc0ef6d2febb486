"""Writes one sample as members of a tar: the image as it is, JSON, masks turned upright.

What is no pair is dropped and counted, and the image is kept for the others: a blank phrase, an
empty mask, a phrase over 1,000. An image goes where nothing is left of what it had, or where its
masks are of another size: then they are not of these pixels.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipeline.base.orientation import turn_upright
from pipeline.corpus.members import Limits
from pipeline.corpus.text import UNPRINTABLE, fold_phrase
from pipeline.decode.images import BadImageError, Header, read_header
from pipeline.ingest.sample import IngestError, Phrase, Sample

LIMITS = Limits()  # encode's own: what is over them, it would reject
_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""Errors of an image's file that leave out that image."""
_OUR_KEYS = ("phrases", "negatives", "caption")


class Rejected(NamedTuple):
    """An image that is left out, or with ``phrase`` one of its phrases."""

    phrase: str | None
    reason: str
    detail: str


@dataclass(slots=True)
class Members:
    """An image's members by extension, without any where it is left out, and what they hold."""

    files: dict[str, bytes] = field(default_factory=dict)
    num_phrases: int = 0
    num_negatives: int = 0
    rejects: list[Rejected] = field(default_factory=list)


def encode_members(sample: Sample) -> Members:
    """Encode a sample: the same bytes at every run.

    An image that is left out has its reason last in ``rejects``: ``bad_image``, ``too_large``,
    ``size`` (a mask is not of the image's size) or ``no_phrase`` (none is left).
    """
    made = Members(rejects=[Rejected(*reject) for reject in sample.rejects])
    try:
        header = read_image_header(sample.image)
        _check_sizes(sample, header)
        phrases = _choose_phrases(sample, made)
    except IngestError as error:
        made.rejects.append(Rejected(None, error.reason, error.detail))
        return made
    negatives = _choose_negatives(sample, phrases, made)
    texts = _describe(phrases, negatives, sample.ids)
    made.files = {_EXTENSIONS[header.format]: sample.image}
    if texts:
        made.files["json"] = json.dumps(texts).encode()
    for number, phrase in enumerate(phrases):
        if phrase.mask is not None:
            made.files[f"mask{number}.png"] = _encode_mask(phrase.mask, header.turn)
    if sample.ignore is not None and sample.ignore.any():
        made.files["ignore.png"] = _encode_mask(sample.ignore, header.turn)
    made.num_phrases, made.num_negatives = len(phrases), len(negatives)
    return made


def tidy_text(text: str) -> str:
    """Return a phrase on one line, of at most 1,000 characters; "" for a blank one."""
    return " ".join(UNPRINTABLE.sub(" ", text).split())[: LIMITS.max_phrase_chars].rstrip()


def read_image_header(image: bytes) -> Header:
    """Read the header of an image to copy; IngestError if encode would not read it."""
    try:
        return read_header(image, max_pixels=LIMITS.max_pixels)
    except BadImageError as error:
        reason = "too_large" if error.reason == "too_large" else "bad_image"
        raise IngestError(reason, error.detail) from error


def _check_sizes(sample: Sample, header: Header) -> None:
    masks = [phrase.mask for phrase in sample.phrases]
    for mask in (*masks, sample.ignore):
        if mask is not None and mask.shape != header.size:
            height, width = header.size
            got = f"a mask of {mask.shape[1]}x{mask.shape[0]}"
            raise IngestError(
                "size", f"expected {width}x{height} as the image is stored, got {got}"
            )
    without = sum(mask is None for mask in masks)
    assert without in (0, len(masks)), "of an image's phrases either all have masks, or none has"


def _choose_phrases(sample: Sample, made: Members) -> list[Phrase]:
    """Return the phrases that are pairs, tidied; the others become rejects.

    Raises:
        IngestError: there were some, none is left, and no negatives either.
    """
    kept: list[Phrase] = []
    for phrase in sample.phrases:
        text = tidy_text(phrase.text)
        if not text:
            made.rejects.append(Rejected(phrase.text, "blank_phrase", "expected a text"))
        elif phrase.mask is not None and not phrase.mask.any():
            made.rejects.append(Rejected(text, "empty_mask", "no pixel of the image is set"))
        elif len(kept) == LIMITS.max_phrases:
            most = f"expected at most {LIMITS.max_phrases} phrases of an image"
            made.rejects.append(Rejected(text, "too_many_phrases", most))
        else:
            kept.append(Phrase(text, phrase.mask, phrase.ids))
    if made.rejects and not kept and not sample.negatives:
        raise IngestError("no_phrase", f"none is left of {len(made.rejects)}")
    return kept


def _choose_negatives(sample: Sample, phrases: Sequence[Phrase], made: Members) -> list[str]:
    """Return the negatives that encode takes, tidied, each once; the others become rejects."""
    own = {fold_phrase(phrase.text) for phrase in phrases}
    kept: dict[str, str] = {}
    for negative in sample.negatives:
        text = tidy_text(negative)
        folded = fold_phrase(text)
        if folded in own:
            detail = "the image has the phrase too, as another annotation says"
            made.rejects.append(Rejected(text, "contradicted_negative", detail))
        elif text and len(kept) == LIMITS.max_phrases:
            most = f"expected at most {LIMITS.max_phrases} negatives of an image"
            made.rejects.append(Rejected(text, "too_many_phrases", most))
        elif text:
            kept.setdefault(folded, text)
    return list(kept.values())


def _describe(
    phrases: Sequence[Phrase], negatives: Sequence[str], ids: Mapping[str, str | int]
) -> dict[str, object]:
    """Return the sample's JSON: ids of the image are scalars, ids of phrases lists beside them."""
    texts: dict[str, object] = {}
    if phrases or negatives:
        texts["phrases"] = [phrase.text for phrase in phrases]
    if negatives:
        texts["negatives"] = list(negatives)
    names = dict.fromkeys(name for phrase in phrases for name in phrase.ids)
    of_phrases = {name: [phrase.ids.get(name) for phrase in phrases] for name in names}
    taken = [
        name for name in (*ids, *names) if name in _OUR_KEYS or (name in ids and name in names)
    ]
    assert not taken, f"ids must have names of their own, but got {taken}"
    return {**texts, **ids, **of_phrases}


def _encode_mask(mask: np.ndarray, turn: int) -> bytes:
    png = io.BytesIO()
    Image.fromarray(turn_upright(mask, turn)).save(png, format="PNG")  # bool: 1 bit a pixel
    return png.getvalue()
