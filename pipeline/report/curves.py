"""The report's training curves: a plot, its legend and a note."""

import base64
import io
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from pipeline.report.text import escape, join_lines

CURVE_SIZE_IN = (7.6, 3.0)
CURVE_DPI = 200
SMOOTHED_PART = 20  # losses are smoothed over a twentieth of the curve
AXIS_COLOR = "#808080"  # readable on the light and on the dark page
# Okabe and Ito's colours, told apart by the colour-blind too, without black and yellow.
CURVE_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")

CURVES_NOTE = "Pale: the loss as it was logged. Strong: smoothed."
VALIDATION_NOTE = " Dots: the loss on validation pairs."


@dataclass(frozen=True)
class Curve:
    """One head's training: a loss for each of ``steps``, and (step, loss) on validation pairs.

    Losses that are not finite leave a gap.

    Raises:
        ValueError: not one loss a step.
    """

    name: str
    steps: Sequence[int]
    losses: Sequence[float]
    validation: Sequence[tuple[int, float]] = ()

    def __post_init__(self) -> None:
        if len(self.steps) != len(self.losses):
            raise ValueError(
                f"curve {self.name!r} must have one loss a step, but got "
                f"{len(self.steps)} steps and {len(self.losses)} losses"
            )


def render_curves(curves: Sequence[Curve]) -> str:
    """One plot of all curves, below a legend."""
    # The names are in HTML, not in the plot: they are hostile input to matplotlib's mathtext.
    legend = [
        f'<li><span style="background:{color}"></span>{escape(curve.name)}</li>'
        for curve, color in zip(curves, itertools.cycle(CURVE_COLORS), strict=False)
    ]
    note = CURVES_NOTE + (VALIDATION_NOTE if any(curve.validation for curve in curves) else "")
    plot = base64.b64encode(_plot_curves(curves)).decode()
    return (
        f'<ul class="legend">\n{join_lines(legend)}\n</ul>\n'
        f'<img class="curves" alt="loss over optimizer steps" src="data:image/png;base64,{plot}">\n'
        f'<p class="note">{note}</p>'
    )


def _plot_curves(curves: Sequence[Curve]) -> bytes:
    """The losses over the steps as a PNG without a ground, for the light and the dark page."""
    figure = Figure(figsize=CURVE_SIZE_IN, dpi=CURVE_DPI, layout="constrained")
    axes = figure.add_subplot()
    highs = []
    for curve, color in zip(curves, itertools.cycle(CURVE_COLORS), strict=False):
        losses = np.asarray(curve.losses, dtype=np.float64)
        losses = np.where(np.isfinite(losses), losses, np.nan)
        smoothed = _smooth(losses)
        axes.plot(curve.steps, losses, color=color, alpha=0.25, linewidth=0.7)
        axes.plot(curve.steps, smoothed, color=color, linewidth=1.6)
        points = np.array([point for point in curve.validation if math.isfinite(point[1])])
        points = points.reshape(-1, 2)
        axes.plot(*points.T, color=color, marker="o", markersize=3.5, linewidth=0.8, linestyle=":")
        highs += [*smoothed[~np.isnan(smoothed)], *points[:, 1]]
    if highs and max(highs) > 0:
        axes.set_ylim(0, 1.2 * max(highs))  # single spikes are cut: they would flatten the rest
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(AXIS_COLOR)
    axes.tick_params(colors=AXIS_COLOR, labelsize=8)
    axes.set_xlabel("step", color=AXIS_COLOR, fontsize=9)
    axes.set_ylabel("loss", color=AXIS_COLOR, fontsize=9)
    axes.grid(axis="y", color=AXIS_COLOR, alpha=0.2, linewidth=0.6)
    file = io.BytesIO()
    figure.savefig(file, format="png", transparent=True, metadata={"Software": None})
    return file.getvalue()


def _smooth(losses: np.ndarray) -> np.ndarray:
    """Centred mean of the finite losses, weighted by a bell over a twentieth of the curve."""
    if losses.size == 0:
        return losses
    # Odd, without its zeros at the ends, and at most as long as the curve.
    window = np.hanning(2 * (losses.size // SMOOTHED_PART // 2) + 3)[1:-1]
    counts = np.convolve(~np.isnan(losses), window, mode="same")
    sums = np.convolve(np.nan_to_num(losses), window, mode="same")
    return np.divide(sums, counts, out=np.full_like(losses, np.nan), where=counts > 1e-6)
