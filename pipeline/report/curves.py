"""The report's plot of training losses."""

import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

CURVE_SIZE_IN = (7.6, 3.0)
CURVE_DPI = 200
SMOOTHED_PART = 20  # losses are smoothed over a twentieth of the curve
AXIS_COLOR = "#808080"  # readable on the light and on the dark page
# Okabe and Ito's colours, told apart by the colour-blind too, without black and yellow.
CURVE_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


@dataclass(frozen=True)
class Curve:
    """One head's training loss by optimizer step; a loss that is not finite leaves a gap."""

    name: str
    losses: Mapping[int, float]


def plot_curves(curves: Sequence[Curve]) -> bytes:
    """Plot losses over steps: a PNG with a transparent ground, for the light and the dark page.

    Colours are ``CURVE_COLORS`` in turn. Names are not drawn: matplotlib would read them as
    mathtext, and fail on some.
    """
    figure = Figure(figsize=CURVE_SIZE_IN, dpi=CURVE_DPI, layout="constrained")
    axes = figure.add_subplot()
    highs: list[float] = []
    for curve, color in zip(curves, itertools.cycle(CURVE_COLORS), strict=False):
        steps, losses = list(curve.losses), np.array(list(curve.losses.values()), dtype=np.float64)
        losses = np.where(np.isfinite(losses), losses, np.nan)
        smoothed = _smooth(losses)
        axes.plot(steps, losses, color=color, alpha=0.25, linewidth=0.7)
        axes.plot(steps, smoothed, color=color, linewidth=1.6)
        highs += smoothed[~np.isnan(smoothed)].tolist()
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
