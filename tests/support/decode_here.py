"""Decodes samples in this process, as a reference for what the decode workers return."""

import hashlib
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from pipeline.corpus.members import Limits, RejectedError
from pipeline.decode.pairs import build_views as join_views
from pipeline.decode.pairs import describe_cutting
from pipeline.decode.sample import (
    decode_named_image,
    decode_named_mask,
    open_reader,
    read_phrases,
    reject_sample,
)
from pipeline.decode.views import SourceImage, cut_phrase, render_views
from pipeline.spec.fields import LatentsSpec


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One decoded sample.

    ``image``: (H, W, 3) uint8 RGB, upright. ``masks``: (H, W) bool, one a phrase, none empty.
    """

    key: str
    image: np.ndarray = field(repr=False)
    image_sha256: str
    phrases: tuple[str, ...]
    masks: tuple[np.ndarray, ...] = field(repr=False)
    orientation: int = 1
    color_profile: str | None = None


def decode_sample(file, members, *, spec=LatentsSpec(model="m"), limits=Limits()):
    """Read one sample from its tar; a Sample, or its sample-level reject."""
    read = open_reader(file)
    try:
        phrases = read_phrases(members, read, limits)
        data = read(members.image)
        num_masks = len(members.masks)
        cutting = describe_cutting(spec)
        picture = decode_named_image(
            data, members.image.name, num_masks=num_masks, limits=limits, cutting=cutting
        )
        size = (picture.image.height, picture.image.width)
        turn = picture.orientation
        masks = tuple(
            decode_named_mask(
                read(mask), mask.name, size=size, turn=turn, limits=limits, cutting=cutting
            )
            for mask in members.masks
        )
    except RejectedError as error:
        return reject_sample(members, error.reason, error.detail)
    facts = picture.orientation, picture.color_profile
    sha256 = hashlib.sha256(data).hexdigest()
    return Sample(members.key, np.array(picture.image), sha256, phrases, masks, *facts)


def build_views(sample, spec):
    """Cut a sample into views with pairs; also the pair-level rejects."""
    cutting = describe_cutting(spec)
    cut_masks = [
        cut_and_mask
        for phrase, mask in enumerate(sample.masks)
        for cut_and_mask in cut_phrase(mask, phrase, cutting, key=sample.key)
    ]
    cuts = [cut for cut, _ in cut_masks]
    height, width = sample.image.shape[:2]
    facts = sample.orientation, sample.color_profile
    source = SourceImage(sample.key, width, height, sample.image_sha256, *facts)
    pixels = render_views(
        Image.fromarray(sample.image), cuts, [mask for _, mask in cut_masks], cutting
    )
    return join_views(cuts, pixels, source, sample.phrases, spec)
