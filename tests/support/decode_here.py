"""Decodes samples in this process, as a reference for what the decode workers return."""

import hashlib
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from pipeline.corpus.members import Limits, RejectedError
from pipeline.decode.pairs import SourceImage, describe_cutting
from pipeline.decode.pairs import build_views as join_views
from pipeline.decode.sample import (
    decode_named_image,
    decode_named_mask,
    open_reader,
    read_phrases,
    reject_sample,
)
from pipeline.decode.views import cut_phrase, render_views


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


def decode_sample(file, members, *, limits=Limits()):
    """Read one sample from its tar; a Sample, or its sample-level reject."""
    read = open_reader(file)
    try:
        phrases = read_phrases(members, read, limits)
        data = read(members.image)
        num_masks = len(members.masks)
        image = decode_named_image(data, members.image.name, num_masks=num_masks, limits=limits)
        size = (image.height, image.width)
        masks = tuple(
            decode_named_mask(read(mask), mask.name, size=size, limits=limits)
            for mask in members.masks
        )
    except RejectedError as error:
        return reject_sample(members, error.reason, error.detail)
    return Sample(members.key, np.array(image), hashlib.sha256(data).hexdigest(), phrases, masks)


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
    source = SourceImage(sample.key, width, height, sample.image_sha256)
    pixels = render_views(
        Image.fromarray(sample.image), cuts, [mask for _, mask in cut_masks], cutting
    )
    return join_views(cuts, pixels, source, sample.phrases, spec)
