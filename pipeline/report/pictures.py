"""The report's pictures: examples with the heads' predictions, and PNG files made elsewhere."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.report import overlay

PICTURE_PX = 2 * 168  # twice its width on the page: sharp on a screen of two pixels to one
TRUTH_COLOR = (0, 160, 220)  # blue: what is true is not taken for what was predicted


@dataclass(frozen=True, eq=False)
class Example:
    """One pair and what the heads predicted for it.

    ``image`` is (H, W, 3) uint8 RGB, ``truth`` (H, W) bool, ``predictions`` maps a head's name to
    its (H, W) float probabilities in [0, 1], ``thresholds`` to what its prediction has to be over.
    Each ``draw_`` method returns a ``data:`` URI.

    Raises:
        ValueError: another shape, dtype or range.
    """

    image: np.ndarray
    phrase: str
    truth: np.ndarray
    predictions: Mapping[str, np.ndarray]
    thresholds: Mapping[str, float]

    def __post_init__(self) -> None:
        overlay.check_image(self.image)
        for mask in (self.truth, *self.predictions.values()):
            overlay.check_mask(mask, self.image.shape[:2])

    def draw_image(self) -> str:
        """The image alone."""
        return overlay.encode_data_uri(overlay.resize_for_display(self.image, PICTURE_PX))

    def draw_truth(self) -> str:
        """The true mask on the image."""
        return self._draw(self.truth, TRUTH_COLOR)

    def draw_prediction(self, head: str) -> str:
        """What a head predicted, on the image."""
        return self._draw(self.predictions[head], overlay.TINT, self.thresholds[head])

    def compute_iou(self, head: str) -> float:
        """Intersection over union of a head's prediction; NaN where both are empty."""
        predicted = self.predictions[head] > self.thresholds[head]
        union = np.count_nonzero(self.truth | predicted)
        return np.count_nonzero(self.truth & predicted) / union if union else math.nan

    def _draw(
        self, mask: np.ndarray, color: overlay.Color, threshold: float = overlay.THRESHOLD
    ) -> str:
        # Enlarged first, so that the outline is thin beside the pixels of a small scene.
        image, mask = (
            overlay.resize_for_display(array, PICTURE_PX) for array in (self.image, mask)
        )
        drawn = overlay.draw_overlay(image, mask, color=color, threshold=threshold)
        return overlay.encode_data_uri(drawn)


@dataclass(frozen=True)
class Picture:
    """A PNG file under its own heading; on the dark page it keeps a white ground.

    ``alt`` says what it shows, for those who cannot see it; ``note`` stands below it.
    """

    title: str
    png: bytes
    alt: str
    note: str = ""
