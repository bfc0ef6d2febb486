"""Pictures of a few fixed validation pairs: the input, the true mask and the prediction.

Ignored pixels are drawn, and counted in the IoU, as background that is predicted as such. The
input is the stored view if the layer keeps it (``keep_image``), else the latent's first three
channels, each stretched to 0..255, in which layout and edges can be seen in false colours.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from models.heads.head import Head
from pipeline.evaluate.scoring import choose_pairs, predict
from pipeline.read.reader import PairReader
from pipeline.read.source import Source
from pipeline.report.overlay import Color, draw_overlay, resize_for_display
from pipeline.runs.config import TrainConfig

NUM_PAIRS = 8
PANEL_PX = 192  # the longer side, about
GAP_PX = 4  # between the panels of a pair
MARGIN_PX = 16  # around and between pairs
TEXT_PX = 14
LINE_PX = 22
TRUTH: Color = (0, 190, 130)  # green; the prediction has the overlays' orange
PAPER, INK, FAINT = (250, 250, 250), (30, 30, 30), (130, 130, 130)
PANELS = ("input", "truth", "prediction")


class ValidationOverlays:
    """Draws the same validation pairs each time, so that the pictures can be compared."""

    def __init__(
        self, config: TrainConfig, source: Source, validation: PairReader, *, draw: int
    ) -> None:
        """Read the images and masks of up to ``NUM_PAIRS`` pairs, and keep them.

        ``validation`` reads the head's inputs of the validation pairs, at the stored draw ``draw``.
        """
        self._numbers = choose_pairs(len(validation), NUM_PAIRS)
        self._validation, self._draws = validation, [draw] * len(self._numbers)
        kept = source.latents.latents.keep_image
        pictures = PairReader(
            source,
            tasks=config.data.validation,
            inputs=frozenset({"image" if kept else "latent"}),
            choice=config.data.validation_filter,
            num_threads=1,
            negatives=False,
        )
        batch = pictures.read(self._numbers, draws=self._draws)
        self._counts_NHW = np.ones(batch.truth.shape, bool)
        if batch.ignore is not None:
            self._counts_NHW = batch.ignore.numpy() == 0
        self._masks_NHW = batch.truth.numpy().astype(bool) & self._counts_NHW
        side = self._masks_NHW.shape[-1]
        self._images = [
            image_HWC if kept else draw_latent(image_HWC, side)
            for image_HWC in (batch.inputs["image"] if kept else batch.inputs["latent"]).numpy()
        ]
        self._phrases = batch.phrases

    def draw(
        self, head: Head, *, device: torch.device, threshold: float
    ) -> tuple[np.ndarray, list[str]]:
        """Return a picture of each pair, (N, H, W, 3) uint8, and captions with phrase and IoU.

        Predicted is what is over ``threshold``.
        """
        batch = self._validation.read(self._numbers, draws=self._draws)
        probability_NHW = predict(head, batch, device=device).numpy().astype(np.float64)
        probability_NHW *= self._counts_NHW
        images, captions = [], []
        for image, mask, probability, phrase in zip(
            self._images, self._masks_NHW, probability_NHW, self._phrases, strict=True
        ):
            images.append(draw_pair(image, mask, probability, threshold=threshold))
            found = probability > threshold
            union = np.count_nonzero(mask | found)
            share = np.count_nonzero(mask & found) / union if union else 1.0
            captions.append(f"{phrase} · IoU {share:.2f} over {threshold:.2f}")
        return np.stack(images), captions


def draw_latent(latent_CHW: np.ndarray, side_px: int) -> np.ndarray:
    """Return a latent's first three channels as a picture (side_px, side_px, 3) uint8.

    Each channel is stretched from its 2nd to its 98th percentile; a value is a square of pixels.
    """
    leading_HWC = latent_CHW[:3].transpose(1, 2, 0).astype(np.float64)
    low, high = np.percentile(leading_HWC, (2, 98), axis=(0, 1))
    stretched_HWC = np.clip((leading_HWC - low) / np.maximum(high - low, 1e-9), 0, 1)
    picture = Image.fromarray(np.rint(255 * stretched_HWC).astype(np.uint8))
    return np.asarray(picture.resize((side_px, side_px), Image.Resampling.NEAREST))


def draw_pair(
    image_HWC: np.ndarray, mask_HW: np.ndarray, probability_HW: np.ndarray, *, threshold: float
) -> np.ndarray:
    """Return the three panels side by side, uint8; the masks are drawn over the image in grey.

    The image is uint8 RGB, the true mask bool, the predicted probability in [0, 1].
    """
    image_HWC = resize_for_display(image_HWC, PANEL_PX)
    grey_HWC = np.asarray(Image.fromarray(image_HWC).convert("L").convert("RGB"))
    truth = draw_overlay(grey_HWC, resize_for_display(mask_HW, PANEL_PX), color=TRUTH)
    predicted = resize_for_display(probability_HW, PANEL_PX)
    found = draw_overlay(grey_HWC, predicted, threshold=threshold)
    gap = np.full((image_HWC.shape[0], GAP_PX, 3), PAPER, np.uint8)
    return np.concatenate([image_HWC, gap, truth, gap, found], axis=1)


def draw_sheet(images_NHWC: np.ndarray, captions: Sequence[str]) -> np.ndarray:
    """Return a sheet (H, W, 3) uint8 of pictures (N, H, W, 3) uint8 in two columns."""
    height, width = images_NHWC.shape[1:3]
    num_columns = min(2, len(captions))
    num_rows = -(-len(captions) // num_columns)
    step_x, step_y = width + MARGIN_PX, height + LINE_PX + MARGIN_PX
    size = (MARGIN_PX + num_columns * step_x, LINE_PX + MARGIN_PX + num_rows * step_y)
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    for column in range(num_columns):
        for number, name in enumerate(PANELS):
            left = MARGIN_PX + column * step_x + number * (width + GAP_PX) // len(PANELS)
            pen.text((left, MARGIN_PX // 2), name, FAINT, font=_font())
    for number, (image_HWC, caption) in enumerate(zip(images_NHWC, captions, strict=True)):
        row, column = divmod(number, num_columns)
        left, top = MARGIN_PX + column * step_x, MARGIN_PX + LINE_PX + row * step_y
        sheet.paste(Image.fromarray(image_HWC), (left, top))
        pen.text((left, top + height + 2), shorten(caption, width), INK, font=_font())
    return np.asarray(sheet)


def shorten(text: str, width_px: int) -> str:
    """Return a text as one line of at most ``width_px``, cut with an ellipsis if it is longer."""
    text = " ".join(text.split())
    if _font().getlength(text) <= width_px:
        return text
    while text and _font().getlength(text + "…") > width_px:
        text = text[:-1]
    return text.rstrip() + "…"


@cache
def _font() -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib; Pillow's own font has only Latin letters."""
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(str(path), TEXT_PX)
