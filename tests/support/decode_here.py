"""Decodes samples in this process, as a reference for what the decode workers return."""

import hashlib
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from pipeline.corpus.members import Limits, RejectedError
from pipeline.corpus.text import SampleText
from pipeline.decode.pairs import build_views as join_views
from pipeline.decode.pairs import describe_cutting
from pipeline.decode.sample import (
    decode_named_image,
    decode_named_mask,
    open_reader,
    read_text,
    reject_sample,
)
from pipeline.decode.views import SourceImage, cut_phrase, render_views
from pipeline.spec.fields import LatentsSpec


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One decoded sample.

    ``image``: (H, W, 3) uint8 RGB, upright. ``masks``: (H, W) bool, one a phrase, none empty, or
    none at all.
    """

    key: str
    image: np.ndarray = field(repr=False)
    image_sha256: str
    text: SampleText
    masks: tuple[np.ndarray, ...] = field(repr=False)
    orientation: int = 1
    color_profile: str | None = None
    ignore: np.ndarray | None = field(default=None, repr=False)

    @property
    def phrases(self):
        return self.text.phrases


def decode_sample(file, members, *, spec=LatentsSpec(model="m"), limits=Limits()):
    """Read one sample from its tar; a Sample, or its sample-level reject."""
    read = open_reader(file)
    try:
        text = read_text(members, read, limits, keep_json=spec.keep_json)
        data = read(members.image)
        num_masks = len(members.pictures) - 1
        cutting = describe_cutting(spec)
        picture = decode_named_image(
            data, members.image.name, num_masks=num_masks, limits=limits, cutting=cutting
        )
        size = (picture.image.height, picture.image.width)
        turn = picture.orientation
        options = {"size": size, "turn": turn, "limits": limits, "cutting": cutting}
        masks = tuple(
            decode_named_mask(read(mask), mask.name, **options).pixels for mask in members.masks
        )
        ignore = None
        if (found := members.ignore) is not None:
            options["may_be_empty"] = True
            ignore = decode_named_mask(read(found), found.name, **options).pixels
    except RejectedError as error:
        return reject_sample(members, error.reason, error.detail)
    facts = picture.orientation, picture.color_profile
    sha256 = hashlib.sha256(data).hexdigest()
    image = np.array(picture.image)
    return Sample(members.key, image, sha256, text, masks, *facts, ignore)


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
        Image.fromarray(sample.image),
        cuts,
        [mask for _, mask in cut_masks],
        cutting,
        sample.ignore,
    )
    return join_views(cuts, pixels, source, sample.text, spec)
