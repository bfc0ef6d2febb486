"""The report's pictures: examples with what the heads made of them, and pictures made elsewhere."""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.report import overlay
from pipeline.report.text import DASH, escape, format_percent, join_lines

CELL_PX = 168  # a picture's width on the page
PICTURE_PX = 2 * CELL_PX  # and in the file: sharp on a screen of two pixels to one
TRUTH_COLOR = (0, 160, 220)  # blue: what is true is not taken for what was predicted
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
EXAMPLES_NOTE = (
    "The tint grows with the predicted probability; the outline runs where it passes 0.5, and the "
    "IoU below a prediction is that pair's at 0.5."
)


@dataclass(frozen=True, eq=False)
class Example:
    """One pair and what the heads made of it.

    ``image`` is (H, W, 3) uint8 RGB, ``truth`` (H, W) bool, ``predictions`` maps a head's name to
    its (H, W) float probabilities in [0, 1].

    Raises:
        ValueError: another shape, dtype or range.
    """

    image: np.ndarray
    phrase: str
    truth: np.ndarray
    predictions: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        if self.truth.dtype != np.bool_:
            raise ValueError(f"truth of {self.phrase!r} must be bool, but got {self.truth.dtype}")
        overlay.check_image(self.image)
        for mask in (self.truth, *self.predictions.values()):
            overlay.check_mask(mask, self.image.shape[:2])


@dataclass(frozen=True)
class Picture:
    """A picture made elsewhere, under its own heading.

    ``png`` is a whole PNG file; on the dark page it keeps a white ground. ``alt`` says what it
    shows, for those who cannot see it; ``note`` stands below it.

    Raises:
        ValueError: no title, or not a PNG.
    """

    title: str
    png: bytes
    alt: str
    note: str = ""

    def __post_init__(self) -> None:
        if not self.title.strip():
            raise ValueError(f"title of a picture must not be empty, but got {self.title!r}")
        if not self.png.startswith(PNG_SIGNATURE):
            raise ValueError(
                f"picture {self.title!r} must be a PNG file, but got {len(self.png)} bytes that "
                f"begin with {self.png[: len(PNG_SIGNATURE)]!r}"
            )


def render_picture(picture: Picture) -> str:
    """The picture as wide as it is, at most as the column, and its note."""
    data = base64.b64encode(picture.png).decode()
    source = f"data:image/png;base64,{data}"
    lines = [f'<img class="picture" alt="{escape(picture.alt)}" src="{source}">']
    if picture.note:
        lines.append(f'<p class="note">{escape(picture.note)}</p>')
    return join_lines(lines)


def render_examples(examples: Sequence[Example]) -> str:
    """A row an example: image, phrase, truth, and a column a head."""
    heads = list(dict.fromkeys(name for example in examples for name in example.predictions))
    names = ["Image", "Phrase", "Truth", *heads]
    header = "".join(f"<th>{escape(name)}</th>" for name in names)
    rows = [f"<tr>{''.join(_render_cells(example, heads))}</tr>" for example in examples]
    return (
        f'<p class="note">{EXAMPLES_NOTE}</p>\n<div class="scroll"><table class="examples">\n'
        f"<thead><tr>{header}</tr></thead>\n<tbody>\n{join_lines(rows)}\n</tbody>\n</table></div>"
    )


def _render_cells(example: Example, heads: Sequence[str]) -> list[str]:
    image = overlay.resize_for_display(example.image, PICTURE_PX)
    cells = [
        f"<td>{_render_array(image, 'image')}</td>",
        f'<td><div class="phrase">{escape(example.phrase)}</div></td>',
        f"<td>{_render_array(_draw(example, example.truth, TRUTH_COLOR), 'truth')}</td>",
    ]
    for head in heads:
        probability = example.predictions.get(head)
        if probability is None:
            cells.append(f"<td>{DASH}</td>")
            continue
        drawn = _draw(example, probability, overlay.TINT)
        score = format_percent(_iou(example.truth, probability > overlay.THRESHOLD))
        picture = _render_array(drawn, f"prediction of {head}")
        cells.append(f'<td>{picture}<div class="score">IoU {score}</div></td>')
    return cells


def _draw(example: Example, mask: np.ndarray, color: overlay.Color) -> np.ndarray:
    # Enlarged first, so that the outline is thin beside the pixels of a small scene.
    image, mask = (overlay.resize_for_display(array, PICTURE_PX) for array in (example.image, mask))
    return overlay.draw_overlay(image, mask, color=color)


def _iou(truth: np.ndarray, predicted: np.ndarray) -> float:
    union = np.count_nonzero(truth | predicted)
    return np.count_nonzero(truth & predicted) / union if union else math.nan


def _render_array(picture: np.ndarray, alt: str) -> str:
    return f'<img alt="{escape(alt)}" src="{overlay.encode_data_uri(picture)}">'
