"""Segments one image by a phrase, without a store, by the same steps as encoding and training.

Square views cover the image. VAE, text encoder and, where the head reads features, UNet encode each
view, in the dtypes of the head's layers; the head gives probabilities, which are averaged where
views overlap, at the image's size.
"""

import hashlib
import logging
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.heads.head import Head
from pipeline.base.machine import choose_device
from pipeline.corpus.members import Limits
from pipeline.decode.images import decode_picture
from pipeline.decode.views import Box, cut_image, whole_box
from pipeline.evaluate.scoring import evaluation_draw
from pipeline.read.batch import collect_features, move_inputs
from pipeline.report.overlay import THRESHOLD, draw_overlay
from pipeline.runs.checkpoint import LDM_FOLDER, load_checkpoint
from pipeline.spec.open_model import open_feature_encoder, open_latent_encoder
from pipeline.stage.draws import Draw, choose_timestep, gather_inputs
from pipeline.stage.stored_form import store_blocks, store_float16, store_text
from pipeline.store.layout import EMPTY_PROMPT

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LiveView:
    """One view and the head's inputs of it, shaped as in a ``read.batch.PairBatch``."""

    box: Box
    inputs: dict[str, Tensor | dict[int, Tensor]]


class Segmenter:
    """A trained head with the frozen latent diffusion model that it needs."""

    def __init__(
        self, checkpoint: Path, *, model: str | None = None, device: str | None = None
    ) -> None:
        """Load a checkpoint and the latent diffusion model that its layers were made with.

        ``model`` is the folder, hub id or URL of that model, if it is not where the layers name it;
        its files must be the same. A converted checkpoint has it in its own folder.

        Raises:
            SpecError: there is no checkpoint.
            ModelFilesError: the model is not there, or is another one.
        """
        self.device = choose_device(device)
        head, self.record = load_checkpoint(checkpoint)
        self.head: Head = head.to(self.device)
        if model is None and self.record.converted is not None:
            own = checkpoint / LDM_FOLDER
            model = str(own) if own.is_dir() else None
        self._latents = open_latent_encoder(self.record.latents, model=model, device=self.device)
        self._features = None
        if self.record.features is not None and "features" in head.reads:
            self._features = open_feature_encoder(
                self.record.features, model=model, device=self.device
            )

    @property
    def threshold(self) -> float:
        """The threshold of the checkpoint's best validation mIoU, 0.5 where it tells none."""
        return THRESHOLD if self.record.threshold is None else self.record.threshold

    def decode_image(self, data: bytes) -> np.ndarray:
        """Decode an image to RGB (H, W, 3) uint8 by the layer's rules; raises BadImageError."""
        spec = self.record.latents.latents
        picture = decode_picture(
            data, max_pixels=Limits().max_pixels, orientation=spec.orientation, color=spec.color
        )
        return np.array(picture.image)

    def shorten(self, phrase: str) -> str:
        """Return the words of a phrase that are read: the tokenizer cuts a prompt at its length."""
        before = self.record.latents.latents.prompts[0].partition("{}")[0]
        find_cut = self._latents.text_encoder.find_cut
        ends = range(1, len(phrase) + 1)
        end = bisect_left(ends, True, key=lambda end: bool(find_cut([before + phrase[:end]])))
        words = phrase[: end + 1].rpartition(" ")[0] if end < len(phrase) else phrase
        return words or phrase[:end]  # of a language that has no spaces, characters

    def segment(self, image_HWC: np.ndarray, phrase: str) -> np.ndarray:
        """Return foreground probabilities (H, W) float32 for an RGB image (H, W, 3) uint8.

        Warns where the phrase is longer than the text encoder reads.

        Raises:
            ValueError: a blank phrase.
        """
        if not phrase.strip():
            raise ValueError("phrase: expected some text, got a blank")
        if unread := phrase.strip()[len(self.shorten(phrase.strip())) :].strip():
            num = self._latents.text_shape[0]
            logger.warning("the text encoder reads %d tokens, which cuts off: %r", num, unread)
        height, width = image_HWC.shape[:2]
        total = np.zeros((height, width), dtype=np.float32)
        weight = np.zeros((height, width), dtype=np.float32)
        for view in self.encode(image_HWC, phrase.strip()):
            with torch.inference_mode():
                logits = self.head(**move_inputs(view.inputs, self.device))
            probability = torch.sigmoid(logits.float())[0, 0].cpu().numpy()
            box = view.box
            size = (box.right - box.left, box.bottom - box.top)
            scaled = Image.fromarray(probability).resize(size, Image.Resampling.BILINEAR)
            total[box.top : box.bottom, box.left : box.right] += np.asarray(scaled)
            weight[box.top : box.bottom, box.left : box.right] += 1
        return total / weight

    def encode(
        self, image_HWC: np.ndarray, phrase: str, *, key: str | None = None
    ) -> list[LiveView]:
        """Encode an image's views as ``encode`` would.

        ``key`` decides the noise; by default it is the SHA-256 of the pixels.
        """
        key = key or hashlib.sha256(image_HWC.tobytes()).hexdigest()
        spec = self.record.latents.latents
        text = self._encode_text(spec.prompts[0].replace("{}", phrase))
        boxes = cover_boxes(image_HWC.shape[1], image_HWC.shape[0], squeeze=spec.crop == "resize")
        return [
            LiveView(box, self._encode_view(image_HWC, box, text, key, number))
            for number, box in enumerate(boxes)
        ]

    def _encode_text(self, prompt: str) -> dict[str, np.ndarray]:
        return store_text(*self._latents.encode_text([prompt])).to_arrays()

    @cached_property
    def _empty_text(self) -> dict[str, np.ndarray]:
        return self._encode_text(EMPTY_PROMPT)

    def _encode_view(
        self, image_HWC: np.ndarray, box: Box, text: Mapping[str, np.ndarray], key: str, number: int
    ) -> dict[str, Tensor | dict[int, Tensor]]:
        layer = self.record.latents
        view = cut_image(Image.fromarray(image_HWC), box, size=layer.latents.size)
        image = torch.from_numpy(view.copy())[None]
        mean, _ = self._latents.encode_image(image)
        latent = store_float16("latent_mean", mean).to_arrays()["latent_mean"]
        inputs: dict[str, Tensor | dict[int, Tensor]] = {
            "image": image,
            "latent": torch.from_numpy(latent).float() * layer.scaling_factor,
        }
        if "text" in self.head.reads:
            inputs |= {name: torch.from_numpy(values).float() for name, values in text.items()}
        if self._features is not None:
            inputs["features"] = self._encode_features(latent, text, key, number)
        return {name: inputs[name] for name in inputs if name in self.head.reads or name in text}

    def _encode_features(
        self, latent: np.ndarray, text: Mapping[str, np.ndarray], key: str, view: int
    ) -> dict[int, Tensor]:
        assert self._features is not None
        assert self.record.features is not None
        spec = self.record.features.features
        trained = self.record.train
        number = evaluation_draw((trained and trained.data.draws) or range(spec.num_draws))
        draw = Draw(key, view, number, choose_timestep(spec, key, view, number), 0, 0)
        if spec.condition == "empty":
            text = self._empty_text
        inputs = gather_inputs(
            [draw],
            read_latents=latent.__getitem__,
            read_text={name: values.__getitem__ for name, values in text.items()},
            seed=spec.seed,
        )
        found = inputs.encode(self._features, scaling_factor=self.record.latents.scaling_factor)
        arrays = store_blocks(found, spec).to_arrays()
        stored = {name: torch.from_numpy(values) for name, values in arrays.items()}
        return {block: value.float() for block, value in collect_features(found, stored).items()}


def cover_boxes(width: int, height: int, *, squeeze: bool) -> list[Box]:
    """Return the views that cover an image: one of all of it, or evenly spaced squares along it.

    Of a longer image these are the fewest squares of its shorter side that cover it, and one more
    so that neighbours overlap.
    """
    side, longer = sorted((width, height))
    if squeeze or side == longer:
        return [whole_box(width, height)]
    num = -(-longer // side) + 1
    starts = [round(i * (longer - side) / (num - 1)) for i in range(num)]
    if width > height:
        return [Box(start, 0, start + side, side) for start in starts]
    return [Box(0, start, side, start + side) for start in starts]


def write_pictures(
    image_HWC: np.ndarray,
    probability_HW: np.ndarray,
    *,
    threshold: float,
    out: Path,
    overlay: Path | None,
) -> float:
    """Write a mask PNG (0 and 255, the source's size) and perhaps an overlay PNG.

    Returns the mask's share of the image.
    """
    mask = probability_HW > threshold
    for path in (out, overlay):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask.astype(np.uint8) * 255).save(out, format="PNG")
    if overlay is not None:
        Image.fromarray(draw_overlay(image_HWC, mask)).save(overlay, format="PNG")
    return float(mask.mean())


def describe_mask(segmenter: Segmenter, probability_HW: np.ndarray, given: float | None) -> str:
    """Say over which threshold a mask is and whence that is, and of an empty one what to try."""
    threshold = segmenter.threshold if given is None else given
    said = f"over {threshold:g}"
    if given is None and segmenter.record.threshold is not None:
        said += ", the threshold of the best validation mIoU"
    elif given is None:
        said += ", as the checkpoint has no validation that tells a better threshold"
    lowest, highest = probability_HW.min(), probability_HW.max()
    if lowest > threshold:
        said += f"\nall is above {threshold:g}; probabilities are {lowest:.2g} to {highest:.2g}"
        return f"{said}: try --threshold {(lowest + highest) / 2:.2g}"
    if highest > threshold:
        return said
    said += f"\nnothing is above {threshold:g}; the highest probability is {highest:.2g}"
    return f"{said}: try --threshold {0.8 * highest:.2g}" if highest else said
